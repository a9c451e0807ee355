#include "optim/image.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "whole_file.h"

enum { PIECE = 1 << 24 }; /* bytes on their way to a device */

/* In the order of muonshard_dtype. */
static const char *const dtype_names[] = {"F32", "BF16", "F16"};

/* ---- writing ---- */

enum { FACTS = 6 };

/* Numbers have one width, so that all steps' images have one size. */
static void write_facts(const image_facts *f, char text[FACTS][24]) {
    snprintf(text[0], sizeof text[0], "%d", IMAGE_VERSION);
    snprintf(text[1], sizeof text[1], "%019" PRId64, f->step);
    snprintf(text[2], sizeof text[2], "%019" PRId64, f->count);
    snprintf(text[3], sizeof text[3], "%d", f->rank);
    snprintf(text[4], sizeof text[4], "%d", f->world_size);
    snprintf(text[5], sizeof text[5], "%016" PRIx64, f->tensors);
}

static const char *const fact_keys[FACTS] = {"muonshard_image", "step",   "count", "rank",
                                             "world_size",      "tensors"};

static muonshard_status make_header(const muonshard_optimizer *o, const image_facts *facts,
                                    image *made, safetensors_tensor *tensors, char *names,
                                    error_text *error) {
    char numbers[FACTS][24];
    safetensors_pair metadata[FACTS];
    write_facts(facts, numbers);
    for (size_t i = 0; i < FACTS; i++)
        metadata[i] = (safetensors_pair){fact_keys[i], numbers[i]};
    for (size_t i = 0; i < made->list.count; i++) {
        const state_slice *s = &made->list.slices[i];
        tensors[i] = (safetensors_tensor){
            .name = names,
            .dtype = safetensors_dtype_find(dtype_names[s->dtype]),
            .dims = s->dims,
            .shape = {s->shape[0], s->shape[1]},
            .bytes = s->count * dtype_size(s->dtype),
        };
        names += sprintf(names, "%s:%s:%zu", state_kind_name(s->kind),
                         o->registry.tensors[s->tensor].name, s->first) +
                 1;
        made->bytes += tensors[i].bytes;
    }
    TRY(safetensors_header("checkpoint", tensors, made->list.count, metadata, FACTS, &made->header,
                           &made->header_bytes, error));
    made->bytes += made->header_bytes;
    return MUONSHARD_OK;
}

muonshard_status image_make(const muonshard_optimizer *o, const image_facts *facts, image *made,
                            error_text *error) {
    *made = (image){.header = NULL};
    TRY(state_owned(o, &made->list, error));
    size_t letters = 1;
    for (size_t i = 0; i < made->list.count; i++)
        letters += strlen(o->registry.tensors[made->list.slices[i].tensor].name) + 48;
    char *names = malloc(letters);
    safetensors_tensor *tensors = calloc(made->list.count + 1, sizeof *tensors);
    const muonshard_status status = names && tensors
                                        ? make_header(o, facts, made, tensors, names, error)
                                        : fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
    free(names);
    free(tensors);
    if (status)
        image_free(made);
    return status;
}

muonshard_status image_fill(muonshard_optimizer *o, const image *made, char *to) {
    copy_item *items = calloc(made->list.count + 1, sizeof *items);
    FAIL_IF(!items, &o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    memcpy(to, made->header, made->header_bytes);
    size_t at = made->header_bytes;
    for (size_t i = 0; i < made->list.count; i++) {
        const state_slice *s = &made->list.slices[i];
        items[i] = (copy_item){to + at, s->memory, s->count * dtype_size(s->dtype)};
        at += items[i].bytes;
    }
    const muonshard_status status =
        o->backend->ops->copy(o->backend, items, made->list.count, STREAM_COMPUTE);
    free(items);
    FAIL_IF(status, &o->error, status, "%s", o->backend->error.text);
    return MUONSHARD_OK;
}

void image_free(image *made) {
    state_free(&made->list);
    free(made->header);
    *made = (image){.header = NULL};
}

/* ---- reading ---- */

/* A slice in some image. */
typedef struct part {
    state_kind kind;
    int tensor;
    size_t first, count;
    muonshard_dtype dtype;
    size_t source, offset; /* bytes into it */
} part;

struct image_set {
    const image_source *sources; /* borrowed, [count] */
    size_t count;
    image_facts facts; /* of the first */
    part *parts;       /* own, by kind, tensor, first */
    size_t part_count, part_room;
};

typedef struct named {
    const char *name;
    int tensor;
} named;

muonshard_status image_source_open(const image_source *from, int *file, error_text *error) {
    uint64_t bytes;
    *file = -1;
    if (from->memory)
        return MUONSHARD_OK;
    *file = whole_file_open(from->directory, from->name, &bytes);
    FAIL_IF(*file < 0 && errno != EINVAL, error, MUONSHARD_ERR_IO, "%s: cannot be read: %s",
            from->name, strerror(errno));
    if (*file >= 0 && bytes == from->bytes)
        return MUONSHARD_OK;
    if (*file >= 0)
        close(*file);
    return fail(error, MUONSHARD_ERR_FORMAT, "%s: no file of %zu bytes", from->name, from->bytes);
}

/* Bytes [at, at + bytes) of a source that is open as `file`. */
static muonshard_status read_bytes(const image_source *from, int file, size_t at, void *to,
                                   size_t bytes, error_text *error) {
    FAIL_IF(at > from->bytes || bytes > from->bytes - at, error, MUONSHARD_ERR_FORMAT,
            "%s: ends at byte %zu, before byte %zu", from->name, from->bytes, at + bytes);
    if (from->memory) {
        memcpy(to, from->memory + at, bytes);
        return MUONSHARD_OK;
    }
    for (char *out = to; bytes > 0;) {
        const ssize_t got = pread(file, out, bytes, (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        FAIL_IF(got < 0, error, MUONSHARD_ERR_IO, "%s: cannot be read: %s", from->name,
                strerror(errno));
        FAIL_IF(got == 0, error, MUONSHARD_ERR_FORMAT, "%s: ends at byte %zu", from->name, at);
        out += got;
        at += (size_t)got;
        bytes -= (size_t)got;
    }
    return MUONSHARD_OK;
}

/* All of a number, decimal or hexadecimal. */
static bool read_number(const char *text, int base, uint64_t *number) {
    char *end;
    errno = 0;
    *number = strtoull(text, &end, base);
    return *text >= '0' && *text <= 'f' && !*end && !errno &&
           *number <= (base == 16 ? UINT64_MAX : INT64_MAX);
}

static muonshard_status read_facts(const safetensors_file *file, image_facts *facts,
                                   error_text *error) {
    uint64_t numbers[FACTS];
    for (size_t k = 0; k < FACTS; k++) {
        const char *value = NULL;
        for (size_t i = 0; i < file->metadata_count; i++)
            if (strcmp(file->metadata[i].key, fact_keys[k]) == 0)
                value = file->metadata[i].value;
        FAIL_IF(!value || !read_number(value, k == 5 ? 16 : 10, &numbers[k]), error,
                MUONSHARD_ERR_FORMAT, "%s: no image of a muonshard rank: metadata '%s' is %s",
                file->path, fact_keys[k], value ? value : "missing");
        FAIL_IF(k == 0 && numbers[0] != IMAGE_VERSION, error, MUONSHARD_ERR_UNSUPPORTED,
                "%s: written in version %s of the format; this library reads version %d",
                file->path, value, IMAGE_VERSION);
    }
    FAIL_IF(numbers[1] > STEP_MOST || numbers[2] > numbers[1], error, MUONSHARD_ERR_FORMAT,
            "%s: step %" PRIu64 ", count %" PRIu64, file->path, numbers[1], numbers[2]);
    FAIL_IF(numbers[4] < 1 || numbers[4] > INT32_MAX || numbers[3] >= numbers[4], error,
            MUONSHARD_ERR_FORMAT, "%s: rank %" PRIu64 " of %" PRIu64, file->path, numbers[3],
            numbers[4]);
    *facts = (image_facts){.step = (int64_t)numbers[1],
                           .count = (int64_t)numbers[2],
                           .rank = (int)numbers[3],
                           .world_size = (int)numbers[4],
                           .tensors = numbers[5]};
    return MUONSHARD_OK;
}

/* "KIND:TENSOR:FIRST" of the registry's tensors; by_name [tensor_count], sorted. */
static muonshard_status read_name(const safetensors_file *file, const safetensors_tensor *from,
                                  const registry *r, const named *by_name, part *out,
                                  error_text *error) {
    const char *colon = strchr(from->name, ':'), *last = strrchr(from->name, ':');
    uint64_t first = 0;
    out->kind =
        colon ? state_kind_find(from->name, (size_t)(colon - from->name)) : STATE_KIND_COUNT;
    FAIL_IF(out->kind == STATE_KIND_COUNT || colon == last || !read_number(last + 1, 10, &first),
            error, MUONSHARD_ERR_FORMAT, "%s: \"%s\" is no slice of a state", file->path,
            from->name);
    const size_t length = (size_t)(last - colon) - 1;
    size_t low = 0, high = r->tensor_count;
    out->tensor = -1;
    while (low < high && out->tensor < 0) {
        const size_t middle = (low + high) / 2;
        const char *name = by_name[middle].name;
        int order = strncmp(colon + 1, name, length);
        order = order ? order : -(int)(name[length] != '\0');
        if (order == 0)
            out->tensor = by_name[middle].tensor;
        else if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    FAIL_IF(out->tensor < 0, error, MUONSHARD_ERR_ARGUMENT, "%s: tensor '%.*s' is not registered",
            file->path, (int)length, colon + 1);
    const size_t elements = r->tensors[out->tensor].elements;
    FAIL_IF(first > elements || from->elements > elements - first, error, MUONSHARD_ERR_FORMAT,
            "%s: \"%s\" goes past the end of its tensor", file->path, from->name);
    out->first = (size_t)first;
    out->count = from->elements;
    return MUONSHARD_OK;
}

static muonshard_status add_parts(image_set *set, const safetensors_file *file, size_t source,
                                  const registry *r, const named *by_name, error_text *error) {
    if (set->part_count + file->tensor_count > set->part_room) {
        const size_t room = 2 * (set->part_count + file->tensor_count);
        part *parts = realloc(set->parts, room * sizeof *parts);
        FAIL_IF(!parts, error, MUONSHARD_ERR_MEMORY, "out of memory");
        set->parts = parts;
        set->part_room = room;
    }
    for (size_t i = 0; i < file->tensor_count; i++) {
        const safetensors_tensor *t = &file->tensors[i];
        part *p = &set->parts[set->part_count];
        int dtype = 0;
        while (dtype < 3 && strcmp(dtype_names[dtype], t->dtype->name) != 0)
            dtype++;
        FAIL_IF(dtype == 3, error, MUONSHARD_ERR_FORMAT, "%s: \"%s\" is %s", file->path, t->name,
                t->dtype->name);
        TRY(read_name(file, t, r, by_name, p, error));
        p->dtype = (muonshard_dtype)dtype;
        p->source = source;
        p->offset = t->offset;
        set->part_count++;
    }
    return MUONSHARD_OK;
}

static muonshard_status check_facts(const image_set *set, const image_facts *facts,
                                    const safetensors_file *file, size_t source, const registry *r,
                                    error_text *error) {
    FAIL_IF(facts->tensors != state_tensors_hash(r), error, MUONSHARD_ERR_ARGUMENT,
            "%s: made of tensors with other names, roles, dtypes or shapes", file->path);
    FAIL_IF(source > 0 && (facts->step != set->facts.step || facts->count != set->facts.count ||
                           facts->world_size != set->facts.world_size),
            error, MUONSHARD_ERR_FORMAT,
            "%s: of step %" PRId64 " of %d ranks; %s is of step %" PRId64 " of %d", file->path,
            facts->step, facts->world_size, set->sources[0].name, set->facts.step,
            set->facts.world_size);
    return MUONSHARD_OK;
}

/* The length that an image begins with is trusted no further than its bytes go. */
static muonshard_status parse_header(const image_source *from, int opened, safetensors_file *file,
                                     error_text *error) {
    uint64_t length = 0;
    TRY(read_bytes(from, opened, 0, &length, sizeof length, error));
    FAIL_IF(length > SAFETENSORS_HEADER_MAX || length > from->bytes - sizeof length, error,
            MUONSHARD_ERR_FORMAT, "%s: its header of %" PRIu64 " bytes goes past its end",
            from->name, length);
    const size_t available = sizeof length + (size_t)length;
    char *header = malloc(available);
    FAIL_IF(!header, error, MUONSHARD_ERR_MEMORY, "%s: out of memory", from->name);
    muonshard_status status = read_bytes(from, opened, 0, header, available, error);
    if (status == MUONSHARD_OK)
        status = safetensors_parse(from->name, header, available, from->bytes, file, error);
    free(header);
    return status;
}

static muonshard_status read_header(const image_source *from, safetensors_file *file,
                                    error_text *error) {
    int opened;
    TRY(image_source_open(from, &opened, error));
    const muonshard_status status = parse_header(from, opened, file, error);
    if (opened >= 0)
        close(opened);
    return status;
}

static muonshard_status open_source(image_set *set, size_t source, const registry *r,
                                    const named *by_name, error_text *error) {
    safetensors_file file;
    image_facts facts;
    TRY(read_header(&set->sources[source], &file, error));
    muonshard_status status = read_facts(&file, &facts, error);
    if (status == MUONSHARD_OK)
        status = check_facts(set, &facts, &file, source, r, error);
    if (status == MUONSHARD_OK && source == 0)
        set->facts = facts;
    if (status == MUONSHARD_OK)
        status = add_parts(set, &file, source, r, by_name, error);
    safetensors_close(&file);
    return status;
}
static int compare_places(state_kind kind, int id, size_t first, const part *p) {
    if (kind != p->kind)
        return kind < p->kind ? -1 : 1;
    if (id != p->tensor)
        return id < p->tensor ? -1 : 1;
    return first < p->first ? -1 : first > p->first;
}

static int compare_parts(const void *left, const void *right) {
    const part *a = left;
    return compare_places(a->kind, a->tensor, a->first, right);
}

static int compare_names(const void *left, const void *right) {
    return strcmp(((const named *)left)->name, ((const named *)right)->name);
}

muonshard_status image_set_open(const registry *r, const image_source *sources, size_t count,
                                image_set **out, error_text *error) {
    image_set *set = calloc(1, sizeof *set);
    named *by_name = calloc(r->tensor_count + 1, sizeof *by_name);
    muonshard_status status = MUONSHARD_OK;
    *out = NULL;
    if (!set || !by_name)
        TRY_GOTO(fail(error, MUONSHARD_ERR_MEMORY, "out of memory"), done);
    if (count == 0)
        TRY_GOTO(fail(error, MUONSHARD_ERR_ARGUMENT, "no images"), done);
    set->sources = sources;
    set->count = count;
    for (size_t i = 0; i < r->tensor_count; i++)
        by_name[i] = (named){r->tensors[i].name, (int)i};
    qsort(by_name, r->tensor_count, sizeof *by_name, compare_names);
    for (size_t i = 0; i < count; i++)
        TRY_GOTO(open_source(set, i, r, by_name, error), done);
    if (set->part_count)
        qsort(set->parts, set->part_count, sizeof *set->parts, compare_parts);
    *out = set;
    set = NULL;
done:
    image_set_close(set);
    free(by_name);
    return status;
}

void image_set_close(image_set *set) {
    if (!set)
        return;
    free(set->parts);
    free(set);
}

const image_facts *image_set_facts(const image_set *set) {
    return &set->facts;
}

/* The last part that begins where `wanted` does, or before; NULL: none of its kind and tensor. */
static const part *first_part(const image_set *set, const state_slice *wanted) {
    size_t low = 0, high = set->part_count;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (compare_places(wanted->kind, wanted->tensor, wanted->first, &set->parts[middle]) < 0)
            high = middle;
        else
            low = middle + 1;
    }
    const part *p = low ? &set->parts[low - 1] : NULL;
    return p && p->kind == wanted->kind && p->tensor == wanted->tensor ? p : NULL;
}

/* What of `wanted` from element `at` of it on lies in one part, in elements: *in_part is where. 0:
 * it is in none. A variance is its matrix's, and cannot be cut. */
static size_t find_run(const image_set *set, const state_slice *wanted, size_t at,
                       const part **found, size_t *in_part) {
    state_slice rest = *wanted;
    rest.first += at;
    const part *p = first_part(set, &rest);
    if (!p || rest.first >= p->first + p->count ||
        (wanted->kind == STATE_VARIANCE &&
         (p->first != wanted->first || p->count != wanted->count)))
        return 0;
    *found = p;
    *in_part = rest.first - p->first;
    const size_t left = wanted->count - at, there = p->count - *in_part;
    return left < there ? left : there;
}

static muonshard_status check_slice(const image_set *set, const registry *r,
                                    const state_slice *wanted, bool init_master,
                                    error_text *error) {
    const char *name = r->tensors[wanted->tensor].name, *kind = state_kind_name(wanted->kind);
    const part *p = NULL;
    size_t in_part, run;
    for (size_t at = 0; at < wanted->count; at += run) {
        run = find_run(set, wanted, at, &p, &in_part);
        if (run == 0 && wanted->kind == STATE_MASTER && init_master)
            return MUONSHARD_OK;
        FAIL_IF(run == 0, error, MUONSHARD_ERR_ARGUMENT,
                "tensor '%s': %s of element %zu on is not there%s", name, kind, wanted->first + at,
                wanted->kind == STATE_MASTER
                    ? "; init_master: from_params makes it from the parameters"
                    : "");
        FAIL_IF(p->dtype != wanted->dtype, error, MUONSHARD_ERR_ARGUMENT,
                "tensor '%s': %s is %s there, %s here", name, kind, dtype_name(p->dtype),
                dtype_name(wanted->dtype));
    }
    return MUONSHARD_OK;
}

muonshard_status image_set_check(const image_set *set, const registry *r, const state_list *wanted,
                                 bool init_master, error_text *error) {
    for (size_t i = 0; i < wanted->count; i++)
        TRY(check_slice(set, r, &wanted->slices[i], init_master, error));
    return MUONSHARD_OK;
}

/* Bytes of a source on their way to where the backend has them. */
typedef struct transfer {
    size_t source, from, bytes;
    char *to;
} transfer;

typedef struct transfers {
    transfer *list; /* own */
    size_t count, room;
} transfers;

static int compare_transfers(const void *left, const void *right) {
    const transfer *a = left, *b = right;
    if (a->source != b->source)
        return a->source < b->source ? -1 : 1;
    return a->from < b->from ? -1 : a->from > b->from;
}

static muonshard_status add_transfers(const image_set *set, const state_slice *wanted,
                                      transfers *all, error_text *error) {
    const size_t size = dtype_size(wanted->dtype);
    const part *p = NULL;
    size_t in_part = 0, run;
    for (size_t at = 0; at < wanted->count; at += run) {
        run = find_run(set, wanted, at, &p, &in_part);
        if (run == 0) /* a master, which has been made of the parameters */
            return MUONSHARD_OK;
        if (all->count == all->room) {
            const size_t room = 2 * all->room + 64;
            transfer *list = realloc(all->list, room * sizeof *list);
            FAIL_IF(!list, error, MUONSHARD_ERR_MEMORY, "out of memory");
            all->list = list;
            all->room = room;
        }
        all->list[all->count++] = (transfer){.source = p->source,
                                             .from = p->offset + in_part * size,
                                             .bytes = run * size,
                                             .to = (char *)wanted->memory + at * size};
    }
    return MUONSHARD_OK;
}

/* piece [PIECE]: what goes to a device goes through it; NULL: to the host. */
static muonshard_status run_transfer(muonshard_optimizer *o, const image_source *from, int file,
                                     const transfer *t, char *piece) {
    if (!piece)
        return read_bytes(from, file, t->from, t->to, t->bytes, &o->error);
    for (size_t done = 0; done < t->bytes; done += PIECE) {
        const size_t count = t->bytes - done < PIECE ? t->bytes - done : PIECE;
        TRY(read_bytes(from, file, t->from + done, piece, count, &o->error));
        const copy_item item = {t->to + done, piece, count};
        const muonshard_status status = o->backend->ops->copy(o->backend, &item, 1, STREAM_COMPUTE);
        FAIL_IF(status, &o->error, status, "%s", o->backend->error.text);
    }
    return MUONSHARD_OK;
}

/* Source by source, from its beginning to its end. */
static muonshard_status run_transfers(const image_set *set, muonshard_optimizer *o,
                                      const transfers *all, char *piece) {
    muonshard_status status = MUONSHARD_OK;
    for (size_t i = 0; i < all->count && status == MUONSHARD_OK;) {
        const size_t source = all->list[i].source;
        int file;
        TRY(image_source_open(&set->sources[source], &file, &o->error));
        for (; i < all->count && all->list[i].source == source && status == MUONSHARD_OK; i++)
            status = run_transfer(o, &set->sources[source], file, &all->list[i], piece);
        if (file >= 0)
            close(file);
    }
    return status;
}

muonshard_status image_set_read(const image_set *set, muonshard_optimizer *o,
                                const state_list *wanted, bool params) {
    transfers all = {NULL, 0, 0};
    char *piece = o->backend->streams ? malloc(PIECE) : NULL;
    muonshard_status status = MUONSHARD_OK;
    if (o->backend->streams && !piece)
        status = fail(&o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    for (size_t i = 0; i < wanted->count && status == MUONSHARD_OK; i++)
        if ((wanted->slices[i].kind == STATE_PARAM) == params)
            status = add_transfers(set, &wanted->slices[i], &all, &o->error);
    if (status == MUONSHARD_OK && all.count) {
        qsort(all.list, all.count, sizeof *all.list, compare_transfers);
        status = run_transfers(set, o, &all, piece);
    }
    free(all.list);
    free(piece);
    return status;
}
