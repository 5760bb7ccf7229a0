/* Loaded before the C library (LD_PRELOAD): writes and fsyncs of files whose path holds $EIO_WRITE or $EIO_FSYNC fail with
 * EIO, as on a disk that breaks. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int broken(int file, const char *variable) {
    const char *part = getenv(variable);
    char link[64], path[PATH_MAX];
    if (!part)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    if (!strstr(path, part))
        return 0;
    errno = EIO;
    return 1;
}

ssize_t write(int file, const void *bytes, size_t count) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    return broken(file, "EIO_WRITE") ? -1 : real(file, bytes, count);
}

int fsync(int file) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return broken(file, "EIO_FSYNC") ? -1 : real(file);
}
