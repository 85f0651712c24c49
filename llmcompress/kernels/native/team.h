/* Work on the threads that torch has. Results do not depend on how many there are: each item is computed alone. */
#ifndef TEAM_H
#define TEAM_H
#include <pthread.h>
#include <stdint.h>

typedef void (*Team)(void (*)(void *), void *, unsigned, unsigned);
typedef void (*Some)(void *);
typedef struct { Some some; void *work; } Share;

static void *share_main(void *data) {
    Share *share = data;
    share->some(share->work);
    return NULL;
}

/* `some(work)` on every thread: those of `team`, GOMP_parallel of the caller's process, or some of our own without it. */
static void together(void *team, Some some, void *work, int64_t threads) {
    pthread_t others[64];
    Share share = {some, work};
    int started = 0;
    if (threads > 1 && team) {
        ((Team)team)(some, work, (unsigned)threads, 0);
        return;
    }
    while (started < threads - 1 && started < 64 && !pthread_create(&others[started], NULL, share_main, &share)) started++;
    some(work);
    while (started) pthread_join(others[--started], NULL);
}
#endif
