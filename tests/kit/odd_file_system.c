/* A file system with faults, for tests: preloaded into a real process.

   FAULTS="fsync-folder=22 flock=37 replace=1"   which calls fail, and with which errno
   FAULTS_IN=/path/of/a/folder                   only for files below it
   HOLD=/path/of/a/file                          while it exists, reads of data do not return
                                                 (and HOLD.held is there once one is held),
   HOLD_DATA=3.npq HOLD_RANK=1                   but only of such paths, in the process of that rank */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* The errno of a fault, or 0. */
static int fault(const char *name, const char *path) {
    const char *below = getenv("FAULTS_IN"), *at = getenv("FAULTS");
    if (at == NULL || (below != NULL && strncmp(path, below, strlen(below)) != 0)) return 0;
    while ((at = strstr(at, name)) != NULL) {
        at += strlen(name);
        if (*at == '=') return atoi(at + 1);
    }
    return 0;
}

static const char *absolute(const char *path) {
    static __thread char whole[8192];
    if (path[0] == '/') return path;
    if (getcwd(whole, 4096) == NULL) return path;
    strcat(whole, "/");
    return strncat(whole, path, 4000);
}

static const char *path_of(int descriptor) {
    static __thread char path[4096];
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    return path;
}

#define FAIL_IF(name, path)                     \
    do {                                        \
        int number = fault(name, path);         \
        if (number) { errno = number; return -1; } \
    } while (0)

static int is_folder(int descriptor) {
    struct stat facts;
    return fstat(descriptor, &facts) == 0 && S_ISDIR(facts.st_mode);
}

int fsync(int descriptor) {
    FAIL_IF(is_folder(descriptor) ? "fsync-folder" : "fsync-file", path_of(descriptor));
    return REAL(fsync)(descriptor);
}

int flock(int descriptor, int operation) {
    FAIL_IF("flock", path_of(descriptor));
    return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(descriptor, operation);
}

int fchmod(int descriptor, mode_t mode) {
    FAIL_IF("chmod", path_of(descriptor));
    return REAL(fchmod)(descriptor, mode);
}

int chmod(const char *path, mode_t mode) {
    FAIL_IF("chmod", absolute(path));
    return REAL(chmod)(path, mode);
}

int utimensat(int folder, const char *path, const struct timespec times[2], int flags) {
    FAIL_IF("utime", absolute(path));
    return REAL(utimensat)(folder, path, times, flags);
}

int futimens(int descriptor, const struct timespec times[2]) {
    FAIL_IF("utime", path_of(descriptor));
    return REAL(futimens)(descriptor, times);
}

int link(const char *old, const char *new) {
    FAIL_IF("link", absolute(new));
    return REAL(link)(old, new);
}

int rename(const char *old, const char *new) {
    if (access(new, F_OK) == 0) FAIL_IF("replace", absolute(new));
    return REAL(rename)(old, new);
}

int unlink(const char *path) {
    if (access(path, F_OK) == 0) FAIL_IF("unlink", absolute(path));
    return REAL(unlink)(path);
}

int statvfs64(const char *path, struct statvfs64 *facts) {
    FAIL_IF("statvfs", absolute(path));
    return REAL(statvfs64)(path, facts);
}

int statvfs(const char *path, struct statvfs *facts) {
    FAIL_IF("statvfs", absolute(path));
    return REAL(statvfs)(path, facts);
}

static void *map(void *(*real)(void *, size_t, int, int, int, off64_t), void *address,
                 size_t length, int protection, int flags, int descriptor, off64_t offset) {
    int number = descriptor < 0 ? 0 : fault("mmap", path_of(descriptor));
    if (number) {
        errno = number;
        return MAP_FAILED;
    }
    return real(address, length, protection, flags, descriptor, offset);
}

void *mmap64(void *address, size_t length, int protection, int flags, int descriptor, off64_t offset) {
    return map(REAL(mmap64), address, length, protection, flags, descriptor, offset);
}

void *mmap(void *address, size_t length, int protection, int flags, int descriptor, off_t offset) {
    return map(REAL(mmap), address, length, protection, flags, descriptor, offset);
}

/* Opening a folder to sync it, where it may be written to but not be read. */
static int opening(const char *path, int flags) {
    struct stat facts;
    if (stat(path, &facts) == 0 && S_ISDIR(facts.st_mode)) return fault("open-folder", absolute(path));
    return (flags & O_ACCMODE) == O_RDONLY ? fault("open-read", absolute(path)) : 0;
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    int number = opening(path, flags);
    if (number) {
        errno = number;
        return -1;
    }
    return REAL(open64)(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    int number = opening(path, flags);
    if (number) {
        errno = number;
        return -1;
    }
    return REAL(open)(path, flags, mode);
}

static void hold(int descriptor) {
    const char *held = getenv("HOLD"), *rank = getenv("HOLD_RANK"), *data = getenv("HOLD_DATA");
    if (held == NULL || strstr(path_of(descriptor), data == NULL ? ".npq" : data) == NULL) return;
    if (rank != NULL && strcmp(rank, getenv("RANK")) != 0) return;
    if (access(held, F_OK) != 0) return;
    char mark[4096];
    snprintf(mark, sizeof mark, "%s.held", held);
    close(creat(mark, 0666));
    while (access(held, F_OK) == 0) usleep(10000);
}

ssize_t read(int descriptor, void *buffer, size_t count) {
    hold(descriptor);
    return REAL(read)(descriptor, buffer, count);
}

ssize_t preadv64(int descriptor, const struct iovec *parts, int count, off64_t offset) {
    hold(descriptor);
    FAIL_IF("preadv", path_of(descriptor));
    return REAL(preadv64)(descriptor, parts, count, offset);
}

ssize_t preadv64v2(int descriptor, const struct iovec *parts, int count, off64_t offset, int flags) {
    hold(descriptor);
    FAIL_IF("preadv", path_of(descriptor));
    return REAL(preadv64v2)(descriptor, parts, count, offset, flags);
}
