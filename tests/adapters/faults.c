/* A disk that fails, for one process: LD_PRELOAD this and call faults_configure(root, seed, per_million), or one of the
 * functions beside it.
 *
 * Calls that change something below root then fail by a schedule that the seed fixes: ENOSPC, EIO, writes that are
 * short, writes that are torn (half of it lands, and the call fails). Some faults begin an episode, in which every
 * such call fails for a while: a disk that is full, a disk that is gone. Reads never fail.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { SHORT = -1, TORN = -2 };

static char root[PATH_MAX];
static uint64_t state;
static uint64_t per_million;
static int episode_left;
static int episode_errno;
static int syncs_to_fail;
static int ends_at_sync;

void faults_configure(const char *folder, uint64_t seed, uint64_t rate)
{
    if (folder != root)
        snprintf(root, sizeof root, "%s", folder);
    state = seed;
    per_million = rate;
    episode_left = 0;
}

/* The next so many fsync and fdatasync calls below the folder fail with EIO, and nothing else does. */
void faults_fail_syncs(const char *folder, int calls)
{
    faults_configure(folder, 0, 0);
    syncs_to_fail = calls;
}

/* The next sync below the folder fails, and every change after it: the disk is gone. */
void faults_end_at_sync(const char *folder)
{
    faults_configure(folder, 0, 0);
    ends_at_sync = 1;
}

/* Every change below the folder fails until the next call of a function like this. */
void faults_fail_all(const char *folder, int error)
{
    faults_configure(folder, 0, 1000000);
    episode_left = INT_MAX;
    episode_errno = error;
}

static uint64_t draw(void) /* splitmix64 */
{
    uint64_t z = __atomic_add_fetch(&state, 0x9e3779b97f4a7c15u, __ATOMIC_RELAXED);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static int below_root(const char *path)
{
    size_t length = strlen(root);
    return length && strncmp(path, root, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int fd_below_root(int fd)
{
    char link[64], path[PATH_MAX];
    if (!root[0])
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    return below_root(path);
}

static int path_below_root(int folder, const char *path)
{
    if (path[0] == '/' || folder == AT_FDCWD)
        return below_root(path);
    return fd_below_root(folder);
}

/* 0, an errno, SHORT or TORN */
static int fate(int here, int writes)
{
    if (!here || !per_million)
        return 0;
    if (episode_left > 0) {
        episode_left--;
        return episode_errno;
    }
    if (draw() % 1000000 >= per_million)
        return 0;
    uint64_t kind = draw();
    int error = kind % 2 ? ENOSPC : EIO;
    if ((kind >> 8) % 6 == 0) {
        episode_left = (int)((kind >> 16) % 30);
        episode_errno = error;
        return error;
    }
    if (writes && (kind >> 4) % 3 == 0)
        return SHORT;
    if (writes && (kind >> 4) % 3 == 1)
        return TORN;
    return error;
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static int fails(int here)
{
    int error = fate(here, 0);
    if (error)
        errno = error;
    return error;
}

ssize_t write(int fd, const void *data, size_t size)
{
    static ssize_t (*next)(int, const void *, size_t);
    if (!next)
        next = REAL(write);
    int what = fate(fd_below_root(fd), size > 1);
    if (what == SHORT)
        return next(fd, data, size / 2);
    if (what == TORN)
        next(fd, data, size / 2);
    if (what) {
        errno = what == TORN ? EIO : what;
        return -1;
    }
    return next(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    static ssize_t (*next)(int, const void *, size_t, off64_t);
    if (!next)
        next = REAL(pwrite64);
    int what = fate(fd_below_root(fd), size > 1);
    if (what == SHORT)
        return next(fd, data, size / 2, at);
    if (what == TORN)
        next(fd, data, size / 2, at);
    if (what) {
        errno = what == TORN ? EIO : what;
        return -1;
    }
    return next(fd, data, size, at);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }

/* What was written is seen after a kill -9 though its sync failed, as it may be after a power cut. */
static int sync_fails(int here)
{
    if (here && ends_at_sync) {
        faults_fail_all(root, EIO);
        ends_at_sync = 0;
    }
    if (here && syncs_to_fail > 0) {
        syncs_to_fail--;
        errno = EIO;
        return 1;
    }
    return fails(here);
}

int fsync(int fd) { return sync_fails(fd_below_root(fd)) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return sync_fails(fd_below_root(fd)) ? -1 : REAL(fdatasync)(fd); }
int ftruncate64(int fd, off64_t size) { return fails(fd_below_root(fd)) ? -1 : REAL(ftruncate64)(fd, size); }
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
int rename(const char *from, const char *to) { return fails(below_root(to)) ? -1 : REAL(rename)(from, to); }
int link(const char *from, const char *to) { return fails(below_root(to)) ? -1 : REAL(link)(from, to); }
int mkdir(const char *path, mode_t mode) { return fails(below_root(path)) ? -1 : REAL(mkdir)(path, mode); }
int unlink(const char *path) { return fails(below_root(path)) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return fails(below_root(path)) ? -1 : REAL(rmdir)(path); }

int renameat(int from_folder, const char *from, int folder, const char *to)
{
    return fails(path_below_root(folder, to)) ? -1 : REAL(renameat)(from_folder, from, folder, to);
}

int mkdirat(int folder, const char *path, mode_t mode)
{
    return fails(path_below_root(folder, path)) ? -1 : REAL(mkdirat)(folder, path, mode);
}

int unlinkat(int folder, const char *path, int flags)
{
    return fails(path_below_root(folder, path)) ? -1 : REAL(unlinkat)(folder, path, flags);
}

static mode_t mode_of(int flags, va_list rest)
{
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

int openat64(int folder, const char *path, int flags, ...)
{
    static int (*next)(int, const char *, int, ...);
    if (!next)
        next = REAL(openat64);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    if (flags & O_CREAT && fails(path_below_root(folder, path)))
        return -1;
    return next(folder, path, flags, mode);
}

#define OPEN_LIKE(name, folder, ...) \
    int name(__VA_ARGS__, int flags, ...) \
    { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); \
        va_end(rest); \
        return openat64(folder, path, flags, mode); \
    }

OPEN_LIKE(open, AT_FDCWD, const char *path)
OPEN_LIKE(open64, AT_FDCWD, const char *path)
OPEN_LIKE(openat, at, int at, const char *path)
