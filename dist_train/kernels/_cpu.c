/* CPU kernels for batch norm over groups of samples, fused with ReLU, for channels-last activations.

   Activations are a matrix [rows, channels] with a row for each position of each sample, float32 or bfloat16. A group is
   a fixed number of consecutive rows; the last group has all remaining rows. Groups are divided into parts of PART rows,
   which threads compute independently. Within a part, float32 accumulators add up RUN rows before they are added to
   float64 totals; parts are added up in order. No sum runs over the lanes of a vector, and no operation is contracted
   to a fused multiply-add: so the bits depend neither on the number of threads nor on the processor's vector width. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { PART = 2048, RUN = 64, TILE = 64 };

#define INLINE static inline __attribute__((always_inline))
/* Compiled for several vector widths; the loader chooses. */
#if defined(VECTORIZED)
/* A test compiles without. */
#elif defined(__x86_64__) && defined(__GLIBC__)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default"), noinline))
#else
#define VECTORIZED __attribute__((noinline))
#endif

typedef struct {
    long long rows;  /* of a group, but for the last */
    long long total; /* rows of all groups */
    long long groups, channels;
    long long parts; /* of the last group, the longest */
    int bfloat16;    /* the activations' type; otherwise float32 */
    int relu, threads;
} Shape;

/* What the second pass needs of a group, [channels] each. */
typedef struct {
    const float *mean, *scale, *weight, *bias;
    const float *mean_gradient, *mean_product; /* of the backward pass */
} Group;

INLINE float get(const void *values, int64_t place, int bfloat16) {
    if (!bfloat16)
        return ((const float *)values)[place];
    uint32_t bits = (uint32_t)((const uint16_t *)values)[place] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest bfloat16, ties to even; a NaN stays one. */
INLINE void put(void *values, int64_t place, float value, int bfloat16) {
    if (!bfloat16) {
        ((float *)values)[place] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ((uint16_t *)values)[place] = (uint16_t)(value == value ? rounded : 0x7fc0);
}

INLINE int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }

/* The ReLU of a gradient: 0 where the output was not positive. A NaN among the outputs lets it pass. */
INLINE float rectified(float gradient, float output) { return output <= 0.0f ? 0.0f : gradient; }

/* Blocks of RUN rows, and within each blocks of TILE channels: so that few pages of memory are in use at a time. */
#define FOR_BLOCKS(first, last, channels) \
    for (int64_t run = (first), stop = smaller(run + RUN, last); run < (last); run = stop, stop = smaller(run + RUN, last)) \
        for (int64_t tile = 0, width = smaller(TILE, channels); tile < (channels); \
             tile += TILE, width = smaller(TILE, (channels) - tile))

/* What a block of channels needs of its group. */
typedef struct {
    float mean[TILE], scale[TILE], factor[TILE], bias[TILE];
} Block;

INLINE void load(Block *restrict block, const Group *restrict group, int64_t tile, int64_t width) {
    for (int64_t lane = 0; lane < width; lane++) {
        block->mean[lane] = group->mean[tile + lane];
        block->scale[lane] = group->scale[tile + lane];
        block->factor[lane] = block->scale[lane] * group->weight[tile + lane];
        block->bias[lane] = group->bias[tile + lane];
    }
}

/* Sums of the rows [first, last), or of their squared distances from `mean`. */
INLINE void sum_rows(
    const void *restrict inputs, int64_t first, int64_t last, int64_t channels, const float *restrict mean,
    double *restrict sums, int bfloat16) {
    memset(sums, 0, (size_t)channels * sizeof *sums);
    FOR_BLOCKS(first, last, channels) {
        float center[TILE] = {0}, partial[TILE] = {0};
        if (mean)
            memcpy(center, mean + tile, (size_t)width * sizeof *center);
        for (int64_t row = run; row < stop; row++)
            for (int64_t lane = 0; lane < width; lane++) {
                float value = get(inputs, row * channels + tile + lane, bfloat16) - center[lane];
                partial[lane] += mean ? value * value : value;
            }
        for (int64_t lane = 0; lane < width; lane++)
            sums[tile + lane] += partial[lane];
    }
}

INLINE void normalize_rows(
    const void *restrict inputs, int64_t first, int64_t last, int64_t channels, const Group *restrict group,
    void *restrict outputs, int bfloat16, int relu) {
    FOR_BLOCKS(first, last, channels) {
        Block block;
        load(&block, group, tile, width);
        for (int64_t row = run; row < stop; row++)
            for (int64_t lane = 0; lane < width; lane++) {
                int64_t place = row * channels + tile + lane;
                float distance = get(inputs, place, bfloat16) - block.mean[lane];
                float result = distance * block.factor[lane] + block.bias[lane];
                put(outputs, place, relu ? rectified(result, result) : result, bfloat16);
            }
    }
}

/* Sums of gradients times standardized inputs, and of gradients: [2, channels]. */
INLINE void sum_gradients(
    const void *restrict upstream, const void *restrict inputs, int64_t first, int64_t last, int64_t channels,
    const Group *restrict group, double *restrict sums, int bfloat16, int relu) {
    memset(sums, 0, 2 * (size_t)channels * sizeof *sums);
    FOR_BLOCKS(first, last, channels) {
        float product[TILE] = {0}, sum[TILE] = {0};
        Block block;
        load(&block, group, tile, width);
        for (int64_t row = run; row < stop; row++)
            for (int64_t lane = 0; lane < width; lane++) {
                int64_t place = row * channels + tile + lane;
                float distance = get(inputs, place, bfloat16) - block.mean[lane];
                float gradient = get(upstream, place, bfloat16);
                if (relu)
                    gradient = rectified(gradient, distance * block.factor[lane] + block.bias[lane]);
                sum[lane] += gradient;
                product[lane] += gradient * (distance * block.scale[lane]);
            }
        for (int64_t lane = 0; lane < width; lane++) {
            sums[tile + lane] += product[lane];
            sums[channels + tile + lane] += sum[lane];
        }
    }
}

INLINE void write_gradients(
    const void *restrict upstream, const void *restrict inputs, int64_t first, int64_t last, int64_t channels,
    const Group *restrict group, void *restrict of_inputs, int bfloat16, int relu) {
    FOR_BLOCKS(first, last, channels) {
        Block block;
        load(&block, group, tile, width);
        float mean_gradient[TILE], mean_product[TILE];
        memcpy(mean_gradient, group->mean_gradient + tile, (size_t)width * sizeof *mean_gradient);
        memcpy(mean_product, group->mean_product + tile, (size_t)width * sizeof *mean_product);
        for (int64_t row = run; row < stop; row++)
            for (int64_t lane = 0; lane < width; lane++) {
                int64_t place = row * channels + tile + lane;
                float distance = get(inputs, place, bfloat16) - block.mean[lane];
                float gradient = get(upstream, place, bfloat16);
                if (relu)
                    gradient = rectified(gradient, distance * block.factor[lane] + block.bias[lane]);
                float centered = gradient - mean_gradient[lane] - distance * block.scale[lane] * mean_product[lane];
                put(of_inputs, place, centered * block.factor[lane], bfloat16);
            }
    }
}

/* Each type and activation has loops of its own, in which nothing is decided. */
VECTORIZED static void sum_part(
    const Shape *shape, const void *inputs, int64_t first, int64_t last, const float *mean, double *sums) {
    if (shape->bfloat16 && mean)
        sum_rows(inputs, first, last, shape->channels, mean, sums, 1);
    else if (shape->bfloat16)
        sum_rows(inputs, first, last, shape->channels, NULL, sums, 1);
    else if (mean)
        sum_rows(inputs, first, last, shape->channels, mean, sums, 0);
    else
        sum_rows(inputs, first, last, shape->channels, NULL, sums, 0);
}

#define FOR_EACH_KIND(kernel, ...) \
    do { \
        if (shape->bfloat16 && shape->relu) \
            kernel(__VA_ARGS__, 1, 1); \
        else if (shape->bfloat16) \
            kernel(__VA_ARGS__, 1, 0); \
        else if (shape->relu) \
            kernel(__VA_ARGS__, 0, 1); \
        else \
            kernel(__VA_ARGS__, 0, 0); \
    } while (0)

VECTORIZED static void normalize_part(
    const Shape *shape, const void *inputs, int64_t first, int64_t last, const Group *group, void *outputs) {
    FOR_EACH_KIND(normalize_rows, inputs, first, last, shape->channels, group, outputs);
}

VECTORIZED static void sum_gradients_of_part(
    const Shape *shape, const void *upstream, const void *inputs, int64_t first, int64_t last, const Group *group,
    double *sums) {
    FOR_EACH_KIND(sum_gradients, upstream, inputs, first, last, shape->channels, group, sums);
}

VECTORIZED static void write_gradients_of_part(
    const Shape *shape, const void *upstream, const void *inputs, int64_t first, int64_t last, const Group *group,
    void *of_inputs) {
    FOR_EACH_KIND(write_gradients, upstream, inputs, first, last, shape->channels, group, of_inputs);
}

static int64_t rows_of(const Shape *shape, int64_t group) {
    return group == shape->groups - 1 ? shape->total - group * shape->rows : shape->rows;
}

/* The rows of a part: none, if its group has fewer parts than the longest. */
static void place_of(const Shape *shape, int64_t index, int64_t *group, int64_t *first, int64_t *last) {
    *group = index / shape->parts;
    int64_t part = index % shape->parts, start = *group * shape->rows, stop = start + rows_of(shape, *group);
    *first = smaller(start + part * PART, stop);
    *last = smaller(*first + PART, stop);
}

#define FOR_PARTS _Pragma("omp parallel for num_threads(shape->threads) if (shape->threads > 1) schedule(static)") \
    for (int64_t index = 0; index < shape->groups * shape->parts; index++)

/* Add up the parts of each group in order: `sums` [groups, parts, length] to `totals` [groups, length]. */
static void add_parts(const Shape *shape, const double *sums, int64_t length, double *totals) {
    memset(totals, 0, (size_t)(shape->groups * length) * sizeof *totals);
    for (int64_t index = 0; index < shape->groups * shape->parts; index++)
        for (int64_t place = 0; place < length; place++)
            totals[index / shape->parts * length + place] += sums[index * length + place];
}

/* Write the outputs, and the means, unbiased variances and 1/deviations of the groups: moments [3, groups, channels]. */
static void normalize(
    const Shape *shape, const void *inputs, const float *weight, const float *bias, double epsilon, void *outputs,
    float *moments, double *sums, double *totals) {
    int64_t channels = shape->channels, groups = shape->groups;
    float *means = moments, *variances = moments + groups * channels, *scales = variances + groups * channels;
    FOR_PARTS {
        int64_t group, first, last;
        place_of(shape, index, &group, &first, &last);
        sum_part(shape, inputs, first, last, NULL, sums + index * channels);
    }
    add_parts(shape, sums, channels, totals);
    for (int64_t place = 0; place < groups * channels; place++)
        means[place] = (float)(totals[place] / (double)rows_of(shape, place / channels));
    FOR_PARTS {
        int64_t group, first, last;
        place_of(shape, index, &group, &first, &last);
        sum_part(shape, inputs, first, last, means + group * channels, sums + index * channels);
    }
    add_parts(shape, sums, channels, totals);
    for (int64_t place = 0; place < groups * channels; place++) {
        int64_t rows = rows_of(shape, place / channels);
        variances[place] = (float)(totals[place] / (double)(rows > 1 ? rows - 1 : 1));
        scales[place] = (float)(1.0 / sqrt(totals[place] / (double)rows + epsilon));
    }
    FOR_PARTS {
        int64_t group, first, last;
        place_of(shape, index, &group, &first, &last);
        int64_t place = group * channels;
        Group of_group = {means + place, scales + place, weight, bias, NULL, NULL};
        normalize_part(shape, inputs, first, last, &of_group, outputs);
    }
}

/* Write the gradient of the inputs, and those of weight and bias for each group: of_groups [2, groups, channels]. */
static void differentiate(
    const Shape *shape, const void *upstream, const void *inputs, const float *weight, const float *bias,
    const float *moments, void *of_inputs, float *of_groups, double *sums, double *totals, float *shares) {
    int64_t channels = shape->channels, groups = shape->groups;
    const float *means = moments, *scales = moments + 2 * groups * channels;
    FOR_PARTS {
        int64_t group, first, last;
        place_of(shape, index, &group, &first, &last);
        int64_t place = group * channels;
        Group of_group = {means + place, scales + place, weight, bias, NULL, NULL};
        sum_gradients_of_part(shape, upstream, inputs, first, last, &of_group, sums + index * 2 * channels);
    }
    add_parts(shape, sums, 2 * channels, totals);
    for (int64_t group = 0; group < groups; group++)
        for (int64_t place = 0; place < 2 * channels; place++) {
            double total = totals[group * 2 * channels + place];
            shares[group * 2 * channels + place] = (float)(total / (double)rows_of(shape, group));
            of_groups[(place / channels * groups + group) * channels + place % channels] = (float)total;
        }
    FOR_PARTS {
        int64_t group, first, last;
        place_of(shape, index, &group, &first, &last);
        int64_t place = group * channels;
        const float *mean_product = shares + 2 * place, *mean_gradient = mean_product + channels;
        Group of_group = {means + place, scales + place, weight, bias, mean_gradient, mean_product};
        write_gradients_of_part(shape, upstream, inputs, first, last, &of_group, of_inputs);
    }
}

/* Tensors are given by the addresses of their first values, as integers. */
#define ADDRESS(integer) ((void *)(uintptr_t)(integer))

static int set_parts(Shape *shape) {
    if (shape->rows < 1 || shape->groups < 1 || shape->channels < 1 || shape->total < shape->rows * shape->groups) {
        PyErr_SetString(PyExc_ValueError, "a group has at least one row, and the last no fewer than the others");
        return 0;
    }
    shape->parts = (rows_of(shape, shape->groups - 1) + PART - 1) / PART;
    return 1;
}

static PyObject *py_normalize(PyObject *module, PyObject *arguments) {
    (void)module;
    unsigned long long inputs, weight, bias, outputs, moments;
    double epsilon;
    Shape shape;
    if (!PyArg_ParseTuple(
            arguments, "(KKKKK)d(LLLLp)pi", &inputs, &weight, &bias, &outputs, &moments, &epsilon, &shape.rows, &shape.total,
            &shape.groups, &shape.channels, &shape.bfloat16, &shape.relu, &shape.threads) ||
        !set_parts(&shape))
        return NULL;
    int64_t values = shape.groups * (shape.parts + 1) * shape.channels;
    double *sums = PyMem_Malloc((size_t)values * sizeof *sums);
    if (!sums)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    normalize(
        &shape, ADDRESS(inputs), ADDRESS(weight), ADDRESS(bias), epsilon, ADDRESS(outputs), ADDRESS(moments), sums,
        sums + shape.groups * shape.parts * shape.channels);
    Py_END_ALLOW_THREADS
    PyMem_Free(sums);
    Py_RETURN_NONE;
}

static PyObject *py_gradients(PyObject *module, PyObject *arguments) {
    (void)module;
    unsigned long long upstream, inputs, weight, bias, moments, of_inputs, of_groups;
    Shape shape;
    if (!PyArg_ParseTuple(
            arguments, "(KKKKKKK)(LLLLp)pi", &upstream, &inputs, &weight, &bias, &moments, &of_inputs, &of_groups,
            &shape.rows, &shape.total, &shape.groups, &shape.channels, &shape.bfloat16, &shape.relu, &shape.threads) ||
        !set_parts(&shape))
        return NULL;
    int64_t per_part = 2 * shape.channels, values = shape.groups * (shape.parts + 1) * per_part;
    double *sums = PyMem_Malloc((size_t)values * sizeof *sums);
    float *shares = PyMem_Malloc((size_t)(shape.groups * per_part) * sizeof *shares);
    if (!sums || !shares) {
        PyMem_Free(sums);
        PyMem_Free(shares);
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    differentiate(
        &shape, ADDRESS(upstream), ADDRESS(inputs), ADDRESS(weight), ADDRESS(bias), ADDRESS(moments),
        ADDRESS(of_inputs), ADDRESS(of_groups), sums, sums + shape.groups * shape.parts * per_part, shares);
    Py_END_ALLOW_THREADS
    PyMem_Free(sums);
    PyMem_Free(shares);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"normalize", py_normalize, METH_VARARGS, "Normalize the groups of a matrix of activations."},
    {"gradients", py_gradients, METH_VARARGS, "Differentiate `normalize`."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&definition); }
