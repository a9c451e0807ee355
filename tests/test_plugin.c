/* The seam to the CUDA plugin: absent, of another version, and there without a device. An explicit
 * backend is never replaced; `auto` says why it took the host. The library to be found comes with
 * LD_LIBRARY_PATH; argv[1] says which case it is. */
#include <stdio.h>
#include <string.h>
#include "kernels/backend.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

static const char *expected;
static const host_options one_thread = {.isa = HOST_PORTABLE, .threads = 1};
static const cuda_options one_device = {.share = false};

static void test_explicit_cuda_is_an_error(void **state) {
    (void)state;
    backend *b = (backend *)(void *)&expected;
    error_text error = {""};
    char why[256];
    assert_int_equal(
        backend_open(BACKEND_CUDA, one_thread, one_device, &b, &error, why, sizeof why),
        MUONSHARD_ERR_UNAVAILABLE);
    assert_null(b);
    assert_non_null(strstr(error.text, expected));
}

static void test_auto_takes_the_host_and_says_why(void **state) {
    (void)state;
    backend *b = NULL;
    error_text error = {""};
    char why[256];
    assert_int_equal(
        backend_open(BACKEND_AUTO, one_thread, one_device, &b, &error, why, sizeof why),
        MUONSHARD_OK);
    assert_string_equal(b->ops->name, "host");
    assert_non_null(strstr(why, "host"));
    assert_non_null(strstr(why, expected));
    backend_close(b);
    char info[1024];
    assert_true(muonshard_info(info, sizeof info) < sizeof info);
    assert_non_null(strstr(info, expected));
}

int main(int argc, char **argv) {
    expected = argc > 1 ? argv[1] : "no NVIDIA driver";
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_explicit_cuda_is_an_error),
        cmocka_unit_test(test_auto_takes_the_host_and_says_why),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
