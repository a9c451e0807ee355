#include "device_images.h"

#include <stdlib.h>
#include <string.h>

#include "optim/optimizer.h"

bool images_on_host(void) {
    const char *name = getenv("MUONSHARD_TEST_BACKEND");
    return !name || strcmp(name, "host") == 0;
}

void images_configure(muonshard_config *config) {
    const char *name = getenv("MUONSHARD_TEST_BACKEND"), *comm = getenv("MUONSHARD_TEST_COMM");
    if (name)
        muonshard_config_set(config, "backend", name);
    if (name && getenv("MUONSHARD_TEST_SHARE"))
        muonshard_config_set(config, "share_gpu", "true");
    if (name && comm)
        muonshard_config_set(config, "comm", comm);
}

static backend *backend_of(const device_images *im) {
    return im->optimizer->backend;
}

static size_t find(const device_images *im, const void *host) {
    size_t i = 0;
    while (i < im->count && im->list[i].host != host)
        i++;
    return i;
}

void *images_add(device_images *im, void *host, size_t bytes) {
    backend *b = backend_of(im);
    void *device = NULL;
    if (!b->streams)
        return host;
    if (im->count == IMAGES_MOST || b->ops->alloc(b, &device, bytes))
        return NULL;
    im->list[im->count].host = host;
    im->list[im->count].device = device;
    im->list[im->count++].bytes = bytes;
    return images_upload(im, host) ? NULL : device;
}

void *images_of(const device_images *im, const void *host) {
    const size_t i = find(im, host);
    return i < im->count ? im->list[i].device : (void *)(uintptr_t)host;
}

static muonshard_status copy(device_images *im, const void *host, bool up) {
    const size_t i = find(im, host);
    if (i == im->count)
        return MUONSHARD_OK;
    void *at = im->list[i].host, *device = im->list[i].device;
    const copy_item item = {up ? device : at, up ? at : device, im->list[i].bytes};
    backend *b = backend_of(im);
    return b->ops->copy(b, &item, 1, STREAM_COMPUTE);
}

muonshard_status images_upload(device_images *im, const void *host) {
    return copy(im, host, true);
}

muonshard_status images_download(device_images *im, const void *host) {
    return copy(im, host, false);
}

/* Freeing waits for the device, which may be waiting for a rank for ever. */
void images_close(device_images *im) {
    if (im->optimizer && im->optimizer->data->dead && im->optimizer->data->ops->writes_after_death)
        im->count = 0;
    for (size_t i = 0; i < im->count; i++)
        backend_of(im)->ops->free(backend_of(im), im->list[i].device);
    im->count = 0;
}
