/* A library to preload: the clock jumps and the disk is slow, as set in a shared file. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct state {
    volatile int64_t clock_seconds; /* added to the time of day */
    volatile int64_t disk_milliseconds; /* of every flush to disk */
};

static struct state nothing, *state = &nothing;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("TORTURE_STATE");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *map = mmap(NULL, sizeof nothing, PROT_READ, MAP_SHARED, file, 0);
    if (map != MAP_FAILED) state = map;
    close(file);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int clock_gettime(clockid_t clock, struct timespec *now) {
    static __typeof__(&clock_gettime) real;
    if (!real) real = REAL(clock_gettime);
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += state->clock_seconds;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static __typeof__(&gettimeofday) real;
    if (!real) real = REAL(gettimeofday);
    int failed = real(now, zone);
    if (!failed && now) now->tv_sec += state->clock_seconds;
    return failed;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}

/* A deadline on the time of day was computed from the clock above, and the kernel knows only its own. */
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    static __typeof__(&pthread_cond_timedwait) real;
    if (!real) real = REAL(pthread_cond_timedwait);
    struct timespec own = *until;
    if (own.tv_sec > 500000000) own.tv_sec -= state->clock_seconds;
    return real(condition, mutex, &own);
}

static void be_slow(void) {
    if (state->disk_milliseconds) usleep((useconds_t)state->disk_milliseconds * 1000);
}

int fsync(int file) {
    static __typeof__(&fsync) real;
    if (!real) real = REAL(fsync);
    be_slow();
    return real(file);
}

int fdatasync(int file) {
    static __typeof__(&fdatasync) real;
    if (!real) real = REAL(fdatasync);
    be_slow();
    return real(file);
}
