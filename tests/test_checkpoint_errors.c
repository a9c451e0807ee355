/* Checkpoints that are damaged, hostile, or of something else: each is refused by all ranks, with
 * the file's name, and changes nothing; of several, the newest sound one is taken. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>
#include "checkpoint_fixture.h"
#include "optim/manifest.h"
#include "safetensors.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { RANKS = 2, FILES = 3, TAIL = 28 };
static const char *const names[FILES] = {"manifest.json", "rank-00000.safetensors",
                                         "rank-00001.safetensors"};

/* The newest checkpoint, of step 2, as it was written; one of step 1 is beside it. */
static bytes sound[FILES];
static bytes older, older_other; /* the files of step 1 */

static const char *path_of(int file) {
    char name[128];
    snprintf(name, sizeof name, "step-00000002/%s", names[file]);
    return in_directory(name);
}

static void save_twice(rig *r, outcome *out) {
    (void)out;
    for (int i = 0; i < 2; i++) {
        rig_gradients(r);
        rig_step(r);
        EXPECT_STATUS(muonshard_save(r->optimizer, checkpoint_directory, NULL), MUONSHARD_OK, "");
    }
}

static int make_two(void **state) {
    if (checkpoint_setup(state))
        return -1;
    const rig_case setup = small_case("{preset: jordan, variance: normuon}");
    session(RANKS, &setup, save_twice);
    for (int f = 0; f < FILES; f++) {
        sound[f] = bytes_of(path_of(f));
        if (!sound[f].data)
            return -1;
    }
    older = bytes_of(in_directory("step-00000001/rank-00000.safetensors"));
    older_other = bytes_of(in_directory("step-00000001/rank-00001.safetensors"));
    return older.data && older_other.data ? 0 : -1;
}

static int remove_two(void **state) {
    for (int f = 0; f < FILES; f++)
        free(sound[f].data);
    free(older.data);
    free(older_other.data);
    return checkpoint_teardown(state);
}

static void restore(void) {
    char command[256];
    for (int f = 0; f < FILES; f++) {
        struct stat info;
        if (lstat(path_of(f), &info) == 0 && !S_ISREG(info.st_mode)) {
            snprintf(command, sizeof command, "rm -rf %s", path_of(f));
            if (system(command) != 0)
                return;
        }
        put_bytes(path_of(f), sound[f].data, sound[f].count);
    }
}

/* ---- one handle, and one damage after the other ---- */

typedef struct damage {
    muonshard_status status; /* of loading it by its own name; OK: the damage is none */
    const char *part;        /* in the text */
} damage;

/* Done by rank 0. False: there are no more. */
typedef bool (*damage_fn)(size_t number, damage *expected);
static damage_fn inflict;
static size_t inflicted, stride;

/* Loads the damaged checkpoint itself, then whatever its directory has. */
static bool try_loading(rig *r, const damage *d) {
    const int rank = muonshard_comm_rank(r->comm);
    muonshard_load_result result = MUONSHARD_LOAD_RESULT_INIT;
    rig_pull(r);
    const uint64_t before = rig_digest(r);
    bool fine =
        EXPECT_STATUS(muonshard_load(r->optimizer, in_directory("step-00000002"), NULL, NULL),
                      d->status, d->part);
    rig_pull(r);
    if (d->status == MUONSHARD_OK)
        return fine;
    fine = fine && EXPECT(rig_digest(r) == before);
    const bool passed_over = d->status == MUONSHARD_ERR_FORMAT || d->status == MUONSHARD_ERR_IO;
    if (rank == 0)
        latest_warning[0] = '\0';
    const muonshard_status status =
        muonshard_load(r->optimizer, checkpoint_directory, NULL, &result);
    fine = fine && EXPECT_STATUS(status, passed_over ? MUONSHARD_OK : d->status, d->part);
    if (passed_over) {
        fine = fine && EXPECT(result.step == 1);
        fine = fine && (rank != 0 || EXPECT(strstr(latest_warning, "step-00000002")));
    }
    return fine;
}

static void suffer(rig *r, outcome *out) {
    static damage expected;
    static bool more;
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    bool fine = true;
    for (size_t i = 0;; i++) {
        if (rank == 0)
            more = inflict(i * stride, &expected);
        threads_barrier(r->comm);
        if (!more)
            break;
        fine = try_loading(r, &expected) && fine;
        threads_barrier(r->comm);
        if (rank == 0) {
            restore();
            inflicted = i + 1;
        }
    }
    EXPECT(fine);
    muonshard_load_result result = MUONSHARD_LOAD_RESULT_INIT;
    EXPECT_STATUS(muonshard_load(r->optimizer, checkpoint_directory, NULL, &result), MUONSHARD_OK,
                  "");
    EXPECT(result.step == 2 && result.count == 2 && result.world_size == RANKS);
    rig_gradients(r);
    rig_step(r);
}

static void suffer_each(damage_fn which, size_t each) {
    const rig_case setup = small_case("{preset: jordan, variance: normuon}");
    inflict = which;
    stride = each;
    session(RANKS, &setup, suffer);
    print_message("%zu tried\n", inflicted);
    assert_true(inflicted > 0);
}

static void suffer_all(damage_fn which) {
    suffer_each(which, 1);
}

/* ---- bytes ---- */

static bool flip(int file, size_t at, unsigned bits, damage *d) {
    if (at >= sound[file].count)
        return false;
    bytes b = {malloc(sound[file].count), sound[file].count};
    memcpy(b.data, sound[file].data, b.count);
    b.data[at] = (char)(b.data[at] ^ (char)bits);
    const bool put = put_bytes(path_of(file), b.data, b.count);
    free(b.data);
    *d = (damage){MUONSHARD_ERR_FORMAT, names[file]};
    return put;
}

static bool flip_manifest(size_t number, damage *d) {
    return flip(0, number, 1U << number % 8, d);
}

static size_t header_of(int file) {
    uint64_t length;
    memcpy(&length, sound[file].data, sizeof length);
    return sizeof length + (size_t)length;
}

/* All of both headers, and of the data what makes 500. */
static bool flip_files(size_t number, damage *d) {
    const int file = 1 + (int)(number % 2);
    const size_t at = number / 2, header = header_of(file);
    const size_t apart = (sound[file].count - header) / 250 + 1;
    const size_t place = at < header ? at : header + (at - header) * apart;
    if (place < sound[file].count)
        return flip(file, place, 1U << number % 8, d);
    return file == 1 && flip_files(number + 1, d);
}

static void every_byte(void **state) {
    (void)state;
    suffer_each(flip_manifest, rows_apart(11));
    suffer_each(flip_files, rows_apart(11));
}

static bool cut(size_t number, damage *d) {
    static const size_t parts[] = {0, 1, 7, 8, 9, 10};
    const size_t whole = sound[0].count, few = sizeof parts / sizeof parts[0];
    if (number < whole) {
        *d = (damage){MUONSHARD_ERR_FORMAT, names[0]};
        return put_bytes(path_of(0), sound[0].data, number);
    }
    const size_t which = number - whole;
    if (which >= few + 5)
        return false;
    const size_t header = header_of(2), count = sound[2].count;
    const size_t lengths[] = {header - 1, header, header + 1, count / 2 + header / 2, count - 1};
    *d = (damage){MUONSHARD_ERR_FORMAT, names[2]};
    return put_bytes(path_of(2), sound[2].data, which < few ? parts[which] : lengths[which - few]);
}

static void truncated(void **state) {
    (void)state;
    suffer_each(cut, rows_apart(11));
}

/* ---- files that aren't what they should be ---- */

/* In the checkpoint's directory. */
static bool shell(const char *command) {
    char line[512];
    snprintf(line, sizeof line, "cd %s/step-00000002 && %s", checkpoint_directory, command);
    return system(line) == 0;
}

static bool replace_files(size_t number, damage *d) {
    static const struct {
        const char *command;
        damage expected;
    } cases[] = {
        {"rm rank-00000.safetensors", {MUONSHARD_ERR_IO, "rank-00000.safetensors"}},
        {"rm rank-00001.safetensors", {MUONSHARD_ERR_IO, "rank-00001.safetensors"}},
        {"mv rank-00000.safetensors x && mv rank-00001.safetensors rank-00000.safetensors && "
         "mv x rank-00001.safetensors",
         {MUONSHARD_ERR_FORMAT, "rank-0000"}},
        {"cp ../step-00000001/rank-00000.safetensors .",
         {MUONSHARD_ERR_FORMAT, "rank-00000.safetensors"}},
        {"cp ../step-00000001/manifest.json .", {MUONSHARD_ERR_FORMAT, "rank-0000"}},
        {"touch rank-00002.safetensors notes.txt manifest.json.1-0.tmp && mkdir more",
         {MUONSHARD_OK, ""}},
        {"echo x >>rank-00001.safetensors", {MUONSHARD_ERR_FORMAT, "rank-00001.safetensors"}},
        {"echo x >>manifest.json", {MUONSHARD_ERR_FORMAT, "manifest.json"}},
        {"mv manifest.json m && ln -s m manifest.json", {MUONSHARD_ERR_IO, "manifest.json"}},
        {"rm manifest.json && mkfifo manifest.json", {MUONSHARD_ERR_IO, "manifest.json"}},
        {"rm manifest.json && mkdir manifest.json", {MUONSHARD_ERR_IO, "manifest.json"}},
        {"mv rank-00001.safetensors ../../outside_$$ && ln -s ../../outside_$$ "
         "rank-00001.safetensors && rm ../../outside_$$",
         {MUONSHARD_ERR_IO, "rank-00001.safetensors"}},
        {"cp rank-00000.safetensors x && ln -sf x rank-00000.safetensors",
         {MUONSHARD_ERR_IO, "rank-00000.safetensors"}},
        {"rm rank-00000.safetensors && mkfifo rank-00000.safetensors",
         {MUONSHARD_ERR_FORMAT, "rank-00000.safetensors"}},
        {"rm rank-00000.safetensors && mkdir rank-00000.safetensors",
         {MUONSHARD_ERR_FORMAT, "rank-00000.safetensors"}},
    };
    if (number >= sizeof cases / sizeof cases[0])
        return false;
    *d = cases[number].expected;
    return shell(cases[number].command);
}

static void wrong_files(void **state) {
    (void)state;
    suffer_all(replace_files);
    assert_true(shell("rm -rf x m notes.txt more rank-00002.safetensors manifest.json.1-0.tmp"));
}

/* ---- hostile: every checksum is right ---- */

/* Own; `text` with the first `from` in it replaced. data NULL: there is none. */
static bytes edited(const char *text, size_t count, const char *from, const char *to) {
    const size_t length = strlen(from), more = strlen(to);
    size_t at = 0;
    while (at + length <= count && memcmp(text + at, from, length) != 0)
        at++;
    if (at + length > count)
        return (bytes){NULL, 0};
    bytes b = {calloc(count + more + 1, 1), count + more - length};
    memcpy(b.data, text, at);
    memcpy(b.data + at, to, more);
    memcpy(b.data + at + more, text + at + length, count - at - length);
    return b;
}

/* The manifest's body, with the checksum it needs. */
static bool put_manifest(const char *body, size_t count) {
    char *text = malloc(count + TAIL + 1);
    memcpy(text, body, count);
    snprintf(text + count, TAIL + 1, ",\"xxh3\":\"%016llx\"}\n",
             (unsigned long long)XXH3_64bits(body, count));
    const bool put = put_bytes(path_of(0), text, count + TAIL);
    free(text);
    return put;
}

static bool edit_manifest(size_t number, damage *d) {
    static const struct {
        const char *from, *to;
        muonshard_status status;
        const char *part;
    } cases[] = {
        {"\"muonshard_checkpoint\": 1", "\"muonshard_checkpoint\": 2", MUONSHARD_ERR_UNSUPPORTED,
         "manifest.json: version 2"},
        {"\"muonshard_checkpoint\": 1", "\"muonshard_checkpoint\": \"1\"", MUONSHARD_ERR_FORMAT,
         "no manifest"},
        {"\"muonshard_checkpoint\": 1", "\"checkpoint\": 1", MUONSHARD_ERR_FORMAT, "no manifest"},
        {"\"world_size\": 2", "\"world_size\": 2147483648", MUONSHARD_ERR_FORMAT, "world_size"},
        {"\"world_size\": 2", "\"world_size\": 2147483647", MUONSHARD_ERR_FORMAT,
         "files of 2 ranks"},
        {"\"world_size\": 2", "\"world_size\": 99999999999999999999", MUONSHARD_ERR_FORMAT, "JSON"},
        {"\"world_size\": 2", "\"world_size\": 1", MUONSHARD_ERR_FORMAT, "files of 2 ranks"},
        {"\"world_size\": 2", "\"world_size\": 0", MUONSHARD_ERR_FORMAT, "world_size"},
        {"\"world_size\": 2", "\"world_size\": -2", MUONSHARD_ERR_FORMAT, "world_size"},
        {"\"world_size\": 2", "\"world_size\": 2, \"world_size\": 2", MUONSHARD_ERR_FORMAT,
         "duplicate"},
        {"\"step\": 2", "\"step\": -1", MUONSHARD_ERR_FORMAT, "step"},
        {"\"step\": 2", "\"step\": 2.0", MUONSHARD_ERR_FORMAT, "step"},
        {"\"step\": 2", "\"step\": 9223372036854775807", MUONSHARD_ERR_FORMAT, "step"},
        {"\"step\": 2", "\"step\": 1", MUONSHARD_ERR_FORMAT, "count"},
        {"\"step\": 2", "\"step\": 3", MUONSHARD_ERR_FORMAT, "the manifest is of step 3"},
        {"\"count\": 2", "\"count\": 3", MUONSHARD_ERR_FORMAT, "count"},
        {"\"count\": 2", "\"count\": 1", MUONSHARD_ERR_FORMAT, "the manifest is of step"},
        {"\"count\": 2", "\"count\": null", MUONSHARD_ERR_FORMAT, "count"},
        {"\"bytes\": ", "\"bytes\": -", MUONSHARD_ERR_FORMAT, "file 0 has no bytes"},
        {"\"bytes\": ", "\"bytes\": 999999999999", MUONSHARD_ERR_FORMAT, "rank-00000.safetensors"},
        {"\"bytes\": ", "\"bits\": ", MUONSHARD_ERR_FORMAT, "file 0 has no bytes"},
        {"\"xxh3\": \"", "\"xxh3\": \"-", MUONSHARD_ERR_FORMAT, "file 0"},
        {"\"xxh3\": \"", "\"xxh3\": \"+0x\", \"_\": \"", MUONSHARD_ERR_FORMAT, "file 0"},
        {"\"files\": [", "\"files\": [{}, ", MUONSHARD_ERR_FORMAT, "files of 3 ranks"},
        {"\"files\": [", "\"files\": 2, \"_\": [", MUONSHARD_ERR_FORMAT, "files of 0 ranks"},
        {"\"tensors\": [", "\"tensors\": {}, \"_\": [", MUONSHARD_ERR_FORMAT, "no tensors"},
        {"\"tensors\": [", "\"tensors\": [1, ", MUONSHARD_ERR_FORMAT, "tensor 0"},
        {"\"shape\": [", "\"shape\": [-1,", MUONSHARD_ERR_FORMAT, "tensor 0"},
        {"\"shape\": [", "\"shape\": [1,1,1,1,1,1,1,", MUONSHARD_ERR_FORMAT, "tensor 0"},
        {"\"shape\": [", "\"shape\": [1,", MUONSHARD_ERR_ARGUMENT, "registered is 'w'"},
        {"\"name\": \"w\"", "\"name\": \"w\\u0007\"", MUONSHARD_ERR_ARGUMENT, "'w?'"},
        {"\"name\": \"w\"", "\"name\": \"w\\u0000\"", MUONSHARD_ERR_FORMAT, "JSON"},
        {"\"name\": \"w\"", "\"name\": \"\xff\"", MUONSHARD_ERR_FORMAT, "JSON"},
        {"\"role\": \"matrix\"", "\"role\": \"sheet\"", MUONSHARD_ERR_ARGUMENT, "'w' sheet"},
        {"\"dtype\": \"fp32\"", "\"dtype\": \"fp31\"", MUONSHARD_ERR_ARGUMENT, "fp31"},
        {"\"config\": \"", "\"config\": [], \"_\": \"", MUONSHARD_ERR_FORMAT, "config"},
        {"\"user\": \"", "\"users\": \"", MUONSHARD_ERR_FORMAT, "user"},
    };
    const size_t count = sound[0].count - TAIL;
    if (number < sizeof cases / sizeof cases[0]) {
        bytes b = edited(sound[0].data, count, cases[number].from, cases[number].to);
        const bool put = b.data && put_manifest(b.data, b.count);
        *d = (damage){put ? cases[number].status : MUONSHARD_ERR_INTERNAL, cases[number].part};
        free(b.data);
        return true;
    }
    if (number > sizeof cases / sizeof cases[0])
        return false;
    char *deep = malloc(100000);
    memset(deep, '[', 100000);
    *d = (damage){MUONSHARD_ERR_FORMAT, "manifest.json: not valid JSON"};
    const bool put = put_manifest(deep, 100000);
    free(deep);
    return put;
}

/* Rank 0's file with another header, and a manifest that agrees with it. */
static bool put_file(const char *header, size_t count) {
    const uint64_t length = count;
    const size_t data = header_of(1), all = sizeof length + count + sound[1].count - data;
    char *file = malloc(all), *text = NULL;
    memcpy(file, &length, sizeof length);
    memcpy(file + sizeof length, header, count);
    memcpy(file + sizeof length + count, sound[1].data + data, sound[1].count - data);
    manifest m;
    size_t size = 0;
    bool put = put_bytes(path_of(1), file, all) &&
               manifest_read("sound", sound[0].data, sound[0].count, &m, NULL) == MUONSHARD_OK;
    if (put) {
        m.files[0] = (manifest_file){all, XXH3_64bits(file, all)};
        put = manifest_write(&m, &text, &size, NULL) == MUONSHARD_OK &&
              put_bytes(path_of(0), text, size);
        manifest_free(&m);
    }
    free(text);
    free(file);
    return put;
}

static bool edit_file(size_t number, damage *d) {
#define FORMAT MUONSHARD_ERR_FORMAT
    static const struct {
        const char *from, *to;
        muonshard_status status;
        const char *part;
    } cases[] = {
        {"\"muonshard_image\":\"1\"", "\"muonshard_image\":\"2\"", MUONSHARD_ERR_UNSUPPORTED,
         "rank-00000.safetensors: written in version 2"},
        {"\"muonshard_image\":\"1\"", "\"muonshard_image\":\"one\"", FORMAT, "muonshard_image"},
        {"\"muonshard_image\":\"1\"", "\"image\":\"1\"", FORMAT, "muonshard_image"},
        {"\"step\":\"000000000000000000", "\"step\":\"900000000000000000", FORMAT, "step"},
        {"\"step\":\"000000000000000000", "\"step\":\"-", FORMAT, "step"},
        {"\"step\":\"000000000000000000", "\"step\":\" ", FORMAT, "step"},
        {"\"step\":\"0000000000000000002", "\"step\":\"0000000000000000003", FORMAT,
         "rank-00000.safetensors is of step 3"},
        {"\"count\":\"0000000000000000002", "\"count\":\"0000000000000000003", FORMAT, "count 3"},
        {"\"rank\":\"0\"", "\"rank\":\"2\"", FORMAT, "rank 2 of 2"},
        {"\"world_size\":\"2\"", "\"world_size\":\"3\"", FORMAT, "of 3"},
        {"\"world_size\":\"2\"", "\"world_size\":\"4294967298\"", FORMAT, "4294967298"},
        {"\"tensors\":\"", "\"tensors\":\"g", FORMAT, "rank-00000.safetensors"},
        {"\"__metadata__\":", "\"__metadata__\":{},\"__metadata__\":", FORMAT, "duplicate"},
        {"\"param:w:0\"", "\"other:w:0\"", FORMAT, "\"other:w:0\" is no slice"},
        {"\"param:w:0\"", "\"param\"", FORMAT, "is no slice"},
        {"\"param:w:0\"", "\"param:w\"", FORMAT, "is no slice"},
        {"\"param:w:0\"", "\"param:w:\"", FORMAT, "is no slice"},
        {"\"param:w:0\"", "\"param:w:-0\"", FORMAT, "is no slice"},
        {"\"param:w:0\"", "\"param:w:0x0\"", FORMAT, "is no slice"},
        {"\"param:w:0\"", "\"param:w:18446744073709551616\"", FORMAT, "is no slice"},
        {"\"param:w:0\"", "\"param:w:9223372036854775807\"", FORMAT, "past the end"},
        {"\"param:w:0\"", "\"param:w:1\"", FORMAT, "past the end"},
        {"\"param:w:0\"", "\"param:\\u001bw:0\"", FORMAT, "control character"},
        {"\"param:w:0\"", "\"param:nobody:0\"", MUONSHARD_ERR_ARGUMENT, "'nobody'"},
        {"\"param:w:0\"", "\"adam_m:w:0\"", MUONSHARD_ERR_ARGUMENT,
         "'w': param of element 0 on is not there"},
        {"\"momentum:w:0\"", "\"adam_m:w:0\"", MUONSHARD_ERR_ARGUMENT,
         "'w': momentum of element 0 on is not there"},
        {"\"dtype\":\"F32\"", "\"dtype\":\"I32\"", FORMAT, "is I32"},
        {"\"dtype\":\"F32\"", "\"dtype\":\"BF16\"", FORMAT, "bytes"},
        {"\"shape\":[8,6]", "\"shape\":[4294967296,4294967296]", FORMAT, "overflows"},
        {"\"shape\":[8,6]", "\"shape\":[8,-6]", FORMAT, "negative"},
        {"\"shape\":[8,6]", "\"shape\":[8,7]", FORMAT, "bytes"},
        {"\"data_offsets\":[0,", "\"data_offsets\":[4,", FORMAT, "bytes"},
        {"\"data_offsets\":[0,", "\"data_offsets\":[0,9", FORMAT, "truncated"},
        {"\"data_offsets\":[0,", "\"data_offsets\":[0,0],\"x\":[0,", FORMAT, "bytes"},
    };
#undef FORMAT
    if (number >= sizeof cases / sizeof cases[0])
        return false;
    bytes b = edited(sound[1].data + 8, header_of(1) - 8, cases[number].from, cases[number].to);
    const bool put = b.data && put_file(b.data, b.count);
    *d = (damage){put ? cases[number].status : MUONSHARD_ERR_INTERNAL, cases[number].part};
    free(b.data);
    return true;
}

static void hostile(void **state) {
    (void)state;
    suffer_all(edit_manifest);
    suffer_all(edit_file);
}

/* ---- of something else ---- */

static void expect_other(const rig_case *saved, const rig_case *here, muonshard_status status,
                         const char *part) {
    const char *to = in_directory("others");
    journey j = JOURNEY_INIT, untouched = JOURNEY_INIT, k = JOURNEY_INIT;
    j.before = 1;
    j.save = true;
    j.to = to;
    j.save_args.keep = 1;
    travel(&j, RANKS, saved);
    assert_int_equal(j.saved[0], MUONSHARD_OK);
    travel(&untouched, RANKS, here);
    k.load = true;
    k.from = to;
    travel(&k, RANKS, here);
    if (k.loaded[0] != status || !strstr(k.message[0], part))
        fail_msg("wanted %d '%s': %d '%s'", status, part, k.loaded[0], k.message[0]);
    for (int rank = 0; status && rank < RANKS; rank++)
        assert_true(k.unchanged[rank] == untouched.at_end[rank]);
}

static void other_tensors(void **state) {
    (void)state;
    const rig_case same = small_case("{preset: jordan}");
    rig_tensor tensors[RIG_MAX_TENSORS];
    rig_case other = same;
    other.tensors = tensors;
    memcpy(tensors, small_model, small_count * sizeof *tensors);
    tensors[2].name = "loss";
    expect_other(&same, &other, MUONSHARD_ERR_ARGUMENT, "registered is 'loss'");
    memcpy(tensors, small_model, small_count * sizeof *tensors);
    tensors[0].shape[0] = 6;
    tensors[0].shape[1] = 8;
    expect_other(&same, &other, MUONSHARD_ERR_ARGUMENT, "'w' matrix fp32 [6, 8]");
    memcpy(tensors, small_model, small_count * sizeof *tensors);
    tensors[0].dtype = tensors[0].grad_dtype = MUONSHARD_BF16;
    expect_other(&same, &other, MUONSHARD_ERR_ARGUMENT, "'w' matrix bf16");
    memcpy(tensors, small_model, small_count * sizeof *tensors);
    tensors[0].role = MUONSHARD_ROLE_ELEMENTWISE;
    expect_other(&same, &other, MUONSHARD_ERR_ARGUMENT, "'w' elementwise");
    memcpy(tensors, small_model, small_count * sizeof *tensors);
    tensors[small_count] = (rig_tensor){RIG_TENSOR("new", MUONSHARD_ROLE_ELEMENTWISE, 1, 3)};
    other.count = small_count + 1;
    expect_other(&same, &other, MUONSHARD_ERR_ARGUMENT, "is nothing; registered is 'new'");
    other.count = small_count - 1;
    expect_other(&same, &other, MUONSHARD_ERR_ARGUMENT, "'steady'");
}

static void other_settings(void **state) {
    (void)state;
    static const struct {
        const char *saved, *here;
        muonshard_status status;
        const char *part;
    } cases[] = {
        {"{momentum_dtype: bf16}", "{momentum_dtype: fp32}", MUONSHARD_ERR_ARGUMENT,
         "momentum is bf16 there, fp32 here"},
        {"{elementwise: lion}", "{elementwise: adamw}", MUONSHARD_ERR_ARGUMENT,
         "tensor 'gain': adam_v of element 0 on is not there"},
        {"{elementwise: adamw}", "{elementwise: lion}", MUONSHARD_OK, ""},
        {"{variance: none}", "{variance: normuon}", MUONSHARD_ERR_ARGUMENT, "variance of element"},
        {"{variance: normuon}", "{variance: none}", MUONSHARD_OK, ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const rig_case saved = small_case(cases[i].saved), here = small_case(cases[i].here);
        expect_other(&saved, &here, cases[i].status, cases[i].part);
    }
}

static size_t compare_masters(const char *path) {
    safetensors_file file;
    size_t compared = 0;
    assert_int_equal(safetensors_open(path, &file, NULL), MUONSHARD_OK);
    for (size_t i = 0; i < file.tensor_count; i++) {
        const safetensors_tensor *master = &file.tensors[i];
        char name[256];
        if (strncmp(master->name, "master:", 7) != 0)
            continue;
        snprintf(name, sizeof name, "param:%s", master->name + 7);
        const safetensors_tensor *param = safetensors_find(&file, name);
        assert_non_null(param);
        for (size_t k = 0; k < master->elements; k++) {
            const uint32_t wide = (uint32_t)((const uint16_t *)param->data)[k] << 16;
            assert_int_equal(((const uint32_t *)master->data)[k], wide);
        }
        compared += master->elements;
    }
    safetensors_close(&file);
    return compared;
}

/* Saved by chance rounding, which keeps no masters. */
static void missing_masters(void **state) {
    (void)state;
    rig_tensor tensors[RIG_MAX_TENSORS];
    memcpy(tensors, small_model, small_count * sizeof *tensors);
    for (size_t i = 0; i < small_count; i++)
        tensors[i].dtype = tensors[i].grad_dtype = MUONSHARD_BF16;
    rig_case saved = small_case("{rounding: stochastic}");
    saved.tensors = tensors;
    const char *const ways[] = {"master: owner", "gather: updates, master: replicated"};
    for (int way = 0; way < 2; way++) {
        rig_case here = saved;
        char yaml[128];
        snprintf(yaml, sizeof yaml, "{%s}", ways[way]);
        here.yaml = yaml;
        expect_other(&saved, &here, MUONSHARD_ERR_ARGUMENT, "master of element 0 on is not there");
        journey j = JOURNEY_INIT;
        j.load = j.save = true;
        j.from = in_directory("others");
        j.to = in_directory("masters");
        snprintf(yaml, sizeof yaml, "{%s, init_master: from_params}", ways[way]);
        j.save_args.keep = 1;
        j.after = 2;
        travel(&j, RANKS, &here);
        assert_int_equal(j.loaded[0], MUONSHARD_OK);
        assert_int_equal(j.saved[0], MUONSHARD_OK);
        char suffix[64];
        size_t compared = 0;
        for (int rank = 0; rank < RANKS; rank++) {
            snprintf(suffix, sizeof suffix, "masters/step-00000001%s/%s", way ? "-2" : "",
                     names[1 + rank]);
            compared += compare_masters(in_directory(suffix));
        }
        assert_int_equal(compared, 8 * 6 + 3 * 4 * 4 + 5);
    }
}

/* ---- images in memory ---- */

/* What is cut off, of another step, or not all there; and ranks that were given different steps. */
static void load_bad_images(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    const void *images[] = {sound[1].data, sound[2].data};
    size_t counts[] = {sound[1].count, sound[2].count};
    const size_t cuts[] = {0, 7, 8, 9, header_of(1) - 1, header_of(1), sound[1].count - 1};
    const muonshard_status damaged = MUONSHARD_ERR_FORMAT;
    rig_pull(r);
    const uint64_t before = rig_digest(r);
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
        counts[0] = rank == 1 ? cuts[i] : sound[1].count; /* one rank's is everybody's */
        EXPECT_STATUS(muonshard_load_memory(r->optimizer, images, counts, 2, NULL, NULL), damaged,
                      "image 0");
    }
    counts[0] = sound[1].count;
    EXPECT_STATUS(muonshard_load_memory(r->optimizer, images, counts, 1, NULL, NULL),
                  MUONSHARD_ERR_ARGUMENT, "is not there");
    images[0] = older.data;
    counts[0] = older.count;
    EXPECT_STATUS(muonshard_load_memory(r->optimizer, images, counts, 2, NULL, NULL), damaged,
                  "image 1: of step 2 of 2 ranks; image 0 is of step 1");
    images[1] = older_other.data;
    counts[1] = older_other.count;
    if (rank == 1) {
        images[0] = sound[1].data;
        images[1] = sound[2].data;
    }
    EXPECT_STATUS(muonshard_load_memory(r->optimizer, images, counts, 2, NULL, NULL),
                  MUONSHARD_ERR_MISMATCH, "images of step 2 here, of step 1 on rank 0");
    rig_pull(r);
    EXPECT(rig_digest(r) == before);
    EXPECT_STATUS(muonshard_load(r->optimizer, checkpoint_directory, NULL, NULL), MUONSHARD_OK, "");
    rig_gradients(r);
    rig_step(r);
}

static void bad_images(void **state) {
    (void)state;
    const rig_case setup = small_case("{preset: jordan, variance: normuon}");
    session(RANKS, &setup, load_bad_images);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_byte),      cmocka_unit_test(truncated),
        cmocka_unit_test(wrong_files),     cmocka_unit_test(hostile),
        cmocka_unit_test(other_tensors),   cmocka_unit_test(other_settings),
        cmocka_unit_test(missing_masters), cmocka_unit_test(bad_images),
    };
    return cmocka_run_group_tests_name("checkpoint_errors", tests, make_two, remove_two);
}
