/* Stands between a program and its C library: calls on files below spool/ and blobs/ fail with EIO, as those of a dying disk do.
 * What fails is said by empty files in the folder $EIO: `sync`, `open`, `read`, and `late` (reads beyond the first MiB); and, there before the
 * program starts, `write` (beyond the first MiB), `send` (sendfile), and `unsent` (sendfile is not there at all). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SPARED (1 << 20)

static int ill(const char *what) {
  const char *folder = getenv("EIO");
  char path[4096];
  if (!folder || snprintf(path, sizeof path, "%s/%s", folder, what) >= (int)sizeof path) return 0;
  return access(path, F_OK) == 0;
}

static int below(const char *path, const char *folder) { return path && strstr(path, folder) != NULL; }

static int lies_below(int fd, const char *folder) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path, folder);
}

#define FAIL do { errno = EIO; return -1; } while (0)

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t at) {
  static ssize_t (*real)(int, const void *, size_t, off64_t);
  if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
  if (at + (off64_t)count > SPARED && ill("write") && lies_below(fd, "/spool/")) FAIL;
  return real(fd, bytes, count, at);
}

/* From here on the kernel refuses this call: where its argument is no less than `least`, for as long as the process lives. */
static void refuse(int call, int argument, unsigned least, int error) {
  struct sock_filter steps[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[argument])),
      BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, least, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog filter = {.len = sizeof steps / sizeof *steps, .filter = steps};
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0) perror("seccomp");
}

/* These do not go through the C library. */
__attribute__((constructor)) static void refuse_calls(void) {
  if (ill("write")) refuse(__NR_pwritev, 3, SPARED, EIO);
  if (ill("send")) refuse(__NR_sendfile, 3, 0, EIO);
  if (ill("unsent")) refuse(__NR_sendfile, 3, 0, ENOSYS);
}

ssize_t pread64(int fd, void *bytes, size_t count, off64_t at) {
  static ssize_t (*real)(int, void *, size_t, off64_t);
  if (!real) real = dlsym(RTLD_NEXT, "pread64");
  int fails = ill("read") || (at + (off64_t)count > SPARED && ill("late"));
  if (fails && lies_below(fd, "/blobs/")) FAIL;
  return real(fd, bytes, count, at);
}

int fsync(int fd) {
  static int (*real)(int);
  if (!real) real = dlsym(RTLD_NEXT, "fsync");
  if (ill("sync") && (lies_below(fd, "/spool/") || lies_below(fd, "/blobs/"))) FAIL;
  return real(fd);
}

int open64(const char *path, int flags, ...) {
  static int (*real)(const char *, int, ...);
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  if (!real) real = dlsym(RTLD_NEXT, "open64");
  if (!(flags & O_DIRECTORY) && below(path, "/blobs/sha256/") && ill("open")) FAIL;
  return real(path, flags, mode);
}
