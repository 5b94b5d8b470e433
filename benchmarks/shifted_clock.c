// Loaded before a program's libraries (LD_PRELOAD), lets its wall clock be CLOCK_SHIFT seconds ahead, or behind where
// that is negative. Clocks that measure how long something takes are the system's own, and so are the times of files.
//
//     cc -O2 -shared -fPIC -o shifted_clock.so shifted_clock.c

#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
  const char *shift = getenv("CLOCK_SHIFT");
  const int failed = syscall(SYS_clock_gettime, clock, now);
  if (!failed && clock == CLOCK_REALTIME && shift) now->tv_sec += atol(shift);
  return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
  struct timespec precise;
  const int failed = clock_gettime(CLOCK_REALTIME, &precise);
  (void)zone;
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return failed;
}

time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
