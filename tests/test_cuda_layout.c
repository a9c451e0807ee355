/* Panels of symmetric products: what they cover, and how many are taken. */
#include "kernels/cuda_layout.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

enum { PROCESSORS = 132 };

/* Every element on and below the diagonal is in exactly one panel, whose columns end where its rows
 * do; all panels but empty ones begin at a multiple of 8, of 128 where there are so many rows. */
static void test_panels_cover(void **state) {
    (void)state;
    for (int64_t m = 1; m <= 2100; m += m < 300 ? 1 : 37)
        for (int panels = 1; panels <= 16; panels++) {
            assert_int_equal(cuda_panel_begin(m, panels, 0), 0);
            assert_int_equal(cuda_panel_begin(m, panels, panels), m);
            for (int i = 0; i < panels; i++) {
                const int64_t begin = cuda_panel_begin(m, panels, i);
                assert_true(begin <= cuda_panel_begin(m, panels, i + 1));
                assert_true(begin == m || begin % (m >= 128 * panels ? 128 : 8) == 0);
            }
        }
}

static double work(int64_t m, int panels) {
    double elements = 0.0;
    for (int i = 0; i < panels; i++) {
        const int64_t end = cuda_panel_begin(m, panels, i + 1);
        elements += (double)((end - cuda_panel_begin(m, panels, i)) * end);
    }
    return elements / ((double)m * (double)m);
}

static void test_panels_save_work(void **state) {
    (void)state;
    assert_true(work(4096, 1) == 1.0);
    for (int k = 2; k <= 8; k++) /* (1 + 1/k)/2 and what the rounding to tiles adds */
        assert_true(work(4096, k) >= 0.5 + 0.5 / k - 1e-12 && work(4096, k) < 0.51 + 0.5 / k);
}

/* Small matrices are made whole: a panel less is a launch less. Large ones are not. */
static void test_panels_that_pay(void **state) {
    (void)state;
    for (int64_t m = 1; m < 256; m++)
        assert_int_equal(cuda_panels(m, m, 1, 0, PROCESSORS), 1);
    assert_int_equal(cuda_panels(768, 768, 1, 0, PROCESSORS), 1);
    assert_true(cuda_panels(4096, 14336, 1, 0, PROCESSORS) > 1);
    assert_true(cuda_panels(2048, 7168, 24, 0, PROCESSORS) > 1);
    /* What is mirrored anyway has that pass for nothing. */
    for (int64_t m = 256; m <= 4096; m += 256)
        assert_true(cuda_panels(m, m, 8, 1, PROCESSORS) >= cuda_panels(m, m, 8, 0, PROCESSORS));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_panels_cover),
        cmocka_unit_test(test_panels_save_work),
        cmocka_unit_test(test_panels_that_pay),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
