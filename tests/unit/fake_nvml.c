/* A libnvidia-ml.so.1 of one GPU, for tests without one: what pynvml calls, with NVML's own signatures. */
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6 };

typedef struct {
    unsigned long long total, free, used;
} Memory;

typedef struct {
    unsigned gpu, memory;
} Utilization;

int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }

const char *nvmlErrorString(int code) { return code == NOT_SUPPORTED ? "Not Supported" : "Not Found"; }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **gpu) {
    static int only;
    *gpu = &only;
    return strcmp(uuid, "GPU-1") ? NOT_FOUND : SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *gpu, Memory *memory) {
    *memory = (Memory){80000, 6000, 74000};
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *gpu, Utilization *percent) {
    *percent = (Utilization){42, 7};
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *gpu, unsigned *milliwatts) {
    *milliwatts = 687500;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(void *gpu, int clock, unsigned *megahertz) {
    *megahertz = clock == 1 ? 1980 : clock == 2 ? 2619 : 0;
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *gpu, unsigned long long *bits) {
    *bits = 0x44;
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(void *gpu, int kind, int counter, unsigned long long *count) {
    static int calls;
    *count = ++calls; /* of volatile counters: since the driver was loaded */
    return kind == 0 && counter == 0 ? SUCCESS : NOT_SUPPORTED;
}
