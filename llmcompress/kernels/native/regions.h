/* Items shared out among threads, such that each reads memory in a straight line as long as it can. */
#ifndef REGIONS_H
#define REGIONS_H
#include <stdatomic.h>
#include <stdint.h>

enum { MOST_REGIONS = 64, LEAST_WHOLES = 4 };

/* Items in as many regions as there are threads. A thread goes through one of its own in a straight line, then helps with the
   others, so that none waits long for the last. */
typedef struct {
    int64_t items, regions, whole;
    atomic_llong threads;
    struct { atomic_llong next; char apart[56]; } region[MOST_REGIONS];
} Regions;

/* Items [first, last); `region` is where it looks, `left` how many regions it has not been through. */
typedef struct { int64_t first, last, region, left; } Span;

static int64_t region_begin(const Regions *all, int64_t region) {
    return region == all->regions ? all->items : all->items * region / all->regions / all->whole * all->whole;
}

/* Regions begin at multiples of `whole`. */
static void set_regions(Regions *all, int64_t items, int64_t threads, int64_t whole) {
    all->items = items, all->whole = whole, all->regions = threads < 1 ? 1 : threads > MOST_REGIONS ? MOST_REGIONS : threads;
    atomic_store(&all->threads, 0);
    for (int64_t r = 0; r < all->regions; r++) atomic_store(&all->region[r].next, region_begin(all, r));
}

/* Where the thread that asks begins. */
static Span first_span(Regions *all) {
    return (Span){0, 0, atomic_fetch_add(&all->threads, 1) % all->regions, all->regions};
}

/* The next `step` items, fewer towards the end of a region, so that threads end together; 0 where none are left. */
static int next_span(Regions *all, int64_t step, Span *span) {
    for (; span->left; span->left--, span->region = (span->region + 1) % all->regions) {
        atomic_llong *next = &all->region[span->region].next;
        int64_t end = region_begin(all, span->region + 1), wanted = (end - atomic_load(next)) / 4;
        wanted = wanted > step ? step : wanted < LEAST_WHOLES * all->whole ? LEAST_WHOLES * all->whole : wanted / all->whole * all->whole;
        span->first = atomic_fetch_add(next, wanted);
        span->last = span->first + wanted < end ? span->first + wanted : end;
        if (span->first < end) return 1;
    }
    return 0;
}
#endif
