/* Text in, windows out: order, repeats, errors, and windows that are functions of seed, step and
 * number. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>
#include "gpt/corpus.h"

static char folder[] = "/tmp/muonshard_corpus_XXXXXX";
static char message[CORPUS_MESSAGE];

static const char *at(const char *name) {
    static char paths[4][256];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static void put(const char *name, const char *text) {
    FILE *file = fopen(at(name), "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, strlen(text), file), strlen(text));
    assert_int_equal(fclose(file), 0);
}

/* Two folders of files, and a link that is a second name for one of them. */
static int make_files(void **state) {
    (void)state;
    assert_non_null(mkdtemp(folder));
    assert_int_equal(mkdir(at("a"), 0700), 0);
    assert_int_equal(mkdir(at("b"), 0700), 0);
    assert_int_equal(mkdir(at("b/folder.txt"), 0700), 0);
    put("a/2.txt", "second ");
    put("a/10.txt", "first ");
    put("b/3.txt", "third ");
    put("b/other.dat", "not asked for");
    assert_int_equal(symlink("a", at("link")), 0);
    return 0;
}

static int remove_files(void **state) {
    (void)state;
    const char *files[] = {"a/2.txt", "a/10.txt", "b/3.txt", "b/other.dat", "link"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        unlink(at(files[i]));
    return rmdir(at("b/folder.txt")) | rmdir(at("a")) | rmdir(at("b")) | rmdir(folder);
}

static muonshard_status load(corpus *c, const char *const *patterns, double val, size_t window) {
    char list[1024] = "";
    for (; *patterns; patterns++) {
        strcat(list, at(*patterns));
        strcat(list, "\n");
    }
    message[0] = '\0';
    return corpus_load(c, list, val, window, message);
}
#define PATTERNS(...) ((const char *const[]){__VA_ARGS__, NULL})

/* Sorted over all patterns by byte values; folders and files not asked for are left out. */
static void order(void **state) {
    (void)state;
    corpus c;
    assert_int_equal(load(&c, PATTERNS("b/*.txt", "a/*"), 0.0, 0), MUONSHARD_OK);
    assert_int_equal(c.file_count, 3);
    assert_int_equal(c.size, 19);
    assert_memory_equal(c.text, "first second third ", 19);
    corpus_free(&c);
}

static void names_of_one_file(void **state) {
    (void)state;
    corpus c;
    assert_int_equal(load(&c, PATTERNS("link/*.txt", "*/2.txt", "*/10.txt"), 0.0, 0), MUONSHARD_OK);
    assert_int_equal(c.file_count, 2);
    assert_memory_equal(c.text, "first second ", c.size);
    corpus_free(&c);
}

static void split(void **state) {
    (void)state;
    corpus c;
    assert_int_equal(load(&c, PATTERNS("a/*.txt"), 0.4, 3), MUONSHARD_OK);
    assert_int_equal(c.size, 13);
    assert_int_equal(c.train_size, 8); /* 13 * 0.4 = 5.2 */
    unsigned char out[3];
    corpus_validation_window(&c, 0, 3, 3, out);
    assert_memory_equal(out, "con", 3);
    corpus_validation_window(&c, 1, 3, 3, out);
    assert_memory_equal(out, "ond", 3);
    corpus_validation_window(&c, 2, 3, 3, out);
    assert_memory_equal(out, "nd ", 3);
    corpus_validation_window(&c, 0, 1, 3, out);
    assert_memory_equal(out, "con", 3);
    corpus_free(&c);
}

static void hash_sees_every_byte(void **state) {
    (void)state;
    corpus c;
    uint64_t hashes[4];
    const char *texts[4] = {"0123456789", "0123456788", "1123456789", "012345678"};
    for (int i = 0; i < 4; i++) {
        put("b/other.dat", texts[i]);
        assert_int_equal(load(&c, PATTERNS("b/other.dat"), 0.0, 0), MUONSHARD_OK);
        hashes[i] = c.hash;
        corpus_free(&c);
        for (int j = 0; j < i; j++)
            assert_true(hashes[i] != hashes[j]);
    }
    put("b/other.dat", "not asked for");
}

static void errors(void **state) {
    (void)state;
    corpus c;
    assert_int_equal(load(&c, PATTERNS("a/*.txt", "a/*.pod"), 0.1, 1), MUONSHARD_ERR_CONFIG);
    assert_non_null(strstr(message, "data.files"));
    assert_non_null(strstr(message, "a/*.pod"));
    corpus_free(&c);
    assert_int_equal(load(&c, PATTERNS("b/fold*"), 0.1, 1), MUONSHARD_ERR_CONFIG);
    assert_non_null(strstr(message, "no regular file"));
    corpus_free(&c);
    /* 13 bytes: 12 and 1 */
    assert_int_equal(load(&c, PATTERNS("a/*.txt"), 0.1, 2), MUONSHARD_ERR_CONFIG);
    assert_non_null(strstr(message, "12 bytes for training and 1 for validation"));
    corpus_free(&c);
    assert_int_equal(load(&c, PATTERNS("a/*.txt"), 0.5, 8), MUONSHARD_ERR_CONFIG);
    corpus_free(&c);
    assert_int_equal(symlink("nowhere", at("b/lost.txt")), 0);
    assert_int_equal(load(&c, PATTERNS("b/*.txt"), 0.1, 1), MUONSHARD_ERR_IO);
    assert_non_null(strstr(message, "b/lost.txt"));
    assert_int_equal(unlink(at("b/lost.txt")), 0);
    corpus_free(&c);
    if (geteuid() != 0) { /* root may read everything */
        assert_int_equal(chmod(at("a/2.txt"), 0), 0);
        assert_int_equal(load(&c, PATTERNS("a/*.txt"), 0.1, 1), MUONSHARD_ERR_IO);
        assert_non_null(strstr(message, "a/2.txt"));
        corpus_free(&c);
        assert_int_equal(chmod(at("a/2.txt"), 0600), 0);
    }
}

enum { TEXT = 100000, WINDOW = 9 };

/* A text whose every place is known from four of its bytes. */
static corpus numbered(void) {
    corpus c = {.size = TEXT, .train_size = TEXT - 20};
    c.text = malloc(TEXT + 4);
    assert_non_null(c.text);
    for (size_t i = 0; i < TEXT; i += 4)
        for (size_t j = 0; j < 4; j++)
            c.text[i + j] = (unsigned char)(i / 4 >> 8 * j);
    return c;
}

/* The place of a window, found by looking for it. */
static size_t place(const corpus *c, const unsigned char *window) {
    for (size_t i = 0; i + WINDOW <= c->train_size; i++)
        if (!memcmp(c->text + i, window, WINDOW))
            return i;
    fail_msg("the window is not in the training text");
    return 0;
}

/* The same arguments give the same text; step, number and seed each give another; starts are spread
 * evenly. */
static void windows(void **state) {
    (void)state;
    corpus c = numbered();
    unsigned char a[WINDOW], b[WINDOW];
    int quarters[4] = {0};
    for (int64_t i = 0; i < 400; i++) {
        corpus_train_window(&c, 5, i / 20, i % 20, WINDOW, a);
        corpus_train_window(&c, 5, i / 20, i % 20, WINDOW, b);
        assert_memory_equal(a, b, WINDOW);
        quarters[place(&c, a) * 4 / TEXT]++;
    }
    for (int q = 0; q < 4; q++) /* 100 expected, deviation 8.7 */
        assert_in_range(quarters[q], 60, 140);
    corpus_train_window(&c, 5, 1, 2, WINDOW, a);
    const int64_t others[3][3] = {{6, 1, 2}, {5, 2, 2}, {5, 1, 3}};
    for (int i = 0; i < 3; i++) {
        corpus_train_window(&c, (uint64_t)others[i][0], others[i][1], others[i][2], WINDOW, b);
        assert_memory_not_equal(a, b, WINDOW);
    }
    corpus_free(&c);
}

/* The only window of a text is found, and its last byte is used. */
static void smallest_text(void **state) {
    (void)state;
    corpus c;
    unsigned char out[6];
    assert_int_equal(load(&c, PATTERNS("b/3.txt"), 0.0, 0), MUONSHARD_OK);
    for (int i = 0; i < 50; i++) {
        corpus_train_window(&c, 1, i, i, 6, out);
        assert_memory_equal(out, "third ", 6);
    }
    bool first = false, last = false;
    for (int i = 0; i < 50; i++) {
        corpus_train_window(&c, 1, i, i, 5, out);
        first |= !memcmp(out, "third", 5);
        last |= !memcmp(out, "hird ", 5);
    }
    assert_true(first && last);
    corpus_free(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(order),         cmocka_unit_test(names_of_one_file),
        cmocka_unit_test(split),         cmocka_unit_test(hash_sees_every_byte),
        cmocka_unit_test(errors),        cmocka_unit_test(windows),
        cmocka_unit_test(smallest_text),
    };
    return cmocka_run_group_tests(tests, make_files, remove_files);
}
