/* Fails or kills at the k-th call that changes files below a folder. Loaded by LD_PRELOAD.
 *
 * cc -shared -fPIC -O1 faults.c -o faults.so -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static size_t length;
static long at, seen;
static int fault, armed; /* an errno; 0 kills */

void fault_arm(const char *path, long k, int error) {
    strncpy(folder, path, sizeof folder - 1);
    length = strlen(folder);
    at = k, seen = 0, fault = error, armed = 1;
}
long fault_seen(void) { return seen; }

static int below(const char *path) {
    char full[2 * PATH_MAX];
    if (!armed || !path) return 0;
    if (path[0] != '/') {
        if (!getcwd(full, PATH_MAX)) return 0;
        strncat(full, "/", 2);
        strncat(full, path, PATH_MAX - 1);
        path = full;
    }
    return !strncmp(path, folder, length);
}
static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    errno = kept;
    if (n < 0) return 0;
    path[n] = 0;
    return !strncmp(path, folder, length);
}
/* Kinds: 'n' a new name (open, mkdir, rename), 'w' data, 'u' a removal. */
static int fails(char kind, int *kill_now) {
    long k = __sync_add_and_fetch(&seen, 1);
    *kill_now = 0;
    if (!at || k < at) return 0;
    if (!fault) {
        if (k == at) *kill_now = 1;
        return k == at;
    }
    if (fault == EIO || fault == EINTR) {
        if (k != at || (fault == EINTR && kind != 'w')) return 0;
    } else if (fault == ENOSPC) {
        if (kind == 'u') return 0;
    } else if (kind == 'w') {
        return 0; /* an open file stays writable */
    }
    errno = fault;
    return 1;
}
static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define CHECK(kind, condition, failed) \
    int now = 0; \
    if ((condition) && fails(kind, &now)) { if (now) die(); return failed; }

#define WRITER(name, args, call, half) \
    ssize_t name args { \
        REAL(name); \
        int now = 0; \
        if (below_fd(fd) && fails('w', &now)) { \
            if (now || (fault == ENOSPC && seen == at)) { \
                ssize_t n = half; \
                if (now) die(); \
                if (n > 0) return n; \
                errno = fault; \
            } \
            return -1; \
        } \
        return call; \
    }
WRITER(write, (int fd, const void *b, size_t n_), real(fd, b, n_), n_ > 1 ? real(fd, b, n_ / 2) : 0)
WRITER(pwrite, (int fd, const void *b, size_t n_, off_t o), real(fd, b, n_, o), n_ > 1 ? real(fd, b, n_ / 2, o) : 0)
WRITER(pwrite64, (int fd, const void *b, size_t n_, off64_t o), real(fd, b, n_, o), n_ > 1 ? real(fd, b, n_ / 2, o) : 0)
WRITER(writev, (int fd, const struct iovec *v, int c), real(fd, v, c), c > 1 ? real(fd, v, 1) : 0)
WRITER(sendfile, (int fd, int in, off_t *o, size_t n_), real(fd, in, o, n_), 0)
WRITER(sendfile64, (int fd, int in, off64_t *o, size_t n_), real(fd, in, o, n_), 0)

#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define OPEN(name, args, last, call, path) \
    int name args { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list l; va_start(l, last); mode = va_arg(l, mode_t); va_end(l); } \
        CHECK('n', CHANGES(flags) && below(path), -1) \
        return call; \
    }
OPEN(open, (const char *p, int flags, ...), flags, real(p, flags, mode), p)
OPEN(open64, (const char *p, int flags, ...), flags, real(p, flags, mode), p)
OPEN(openat, (int d, const char *p, int flags, ...), flags, real(d, p, flags, mode), p)
OPEN(openat64, (int d, const char *p, int flags, ...), flags, real(d, p, flags, mode), p)
FILE *fopen(const char *p, const char *m) { REAL(fopen); CHECK('n', strpbrk(m, "wa+") && below(p), NULL) return real(p, m); }
FILE *fopen64(const char *p, const char *m) { REAL(fopen64); CHECK('n', strpbrk(m, "wa+") && below(p), NULL) return real(p, m); }
int mkdir(const char *p, mode_t m) { REAL(mkdir); CHECK('n', below(p), -1) return real(p, m); }
int rename(const char *a, const char *b) { REAL(rename); CHECK('n', below(b), -1) return real(a, b); }
int unlink(const char *p) { REAL(unlink); CHECK('u', below(p), -1) return real(p); }
int rmdir(const char *p) { REAL(rmdir); CHECK('u', below(p), -1) return real(p); }
int chmod(const char *p, mode_t m) { REAL(chmod); CHECK('n', below(p), -1) return real(p, m); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); CHECK('w', below_fd(fd), -1) return real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); CHECK('w', below_fd(fd), -1) return real(fd, n); }
int fsync(int fd) { REAL(fsync); CHECK('w', below_fd(fd), -1) return real(fd); }
