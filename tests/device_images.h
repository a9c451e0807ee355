/* device_images.h - arrays of the host's that an optimizer is given, in whatever memory its backend
 * wants them: on the host they are what they are. Nothing here asserts. */
#ifndef DEVICE_IMAGES_H
#define DEVICE_IMAGES_H

#include <stdbool.h>
#include <muonshard.h>

enum { IMAGES_MOST = 64 };

typedef struct device_images {
    muonshard_optimizer *optimizer; /* borrowed, alive until images_close */
    struct {
        void *host, *device;
        size_t bytes;
    } list[IMAGES_MOST];
    size_t count;
} device_images;

/* Whether tests run on the host backend: MUONSHARD_TEST_BACKEND names no other. */
bool images_on_host(void);
/* Sets backend and comm to MUONSHARD_TEST_BACKEND and MUONSHARD_TEST_COMM, where those are set;
 * with MUONSHARD_TEST_SHARE ranks share a device. */
void images_configure(muonshard_config *config);
/* What the optimizer is to be given for `host`, whose bytes go there; NULL after an error. */
void *images_add(device_images *im, void *host, size_t bytes);
/* What it was given. */
void *images_of(const device_images *im, const void *host);
muonshard_status images_upload(device_images *im, const void *host);
muonshard_status images_download(device_images *im, const void *host);
void images_close(device_images *im);

#endif
