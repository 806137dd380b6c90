/* What a TVM CPU kernel asks of its host: parallel loops and scratch memory, here on torch's own OpenMP threads.
 *
 * One pool of threads then serves torch and the kernels (two pools lose time by spinning against each other), and
 * libtvm_runtime is not needed. The OpenMP entry points are passed in by the loader, so that this library links to
 * libc alone and can never bring in a second OpenMP.
 */
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
  void *sync_handle;
  int32_t num_task;
} Environment;
typedef int (*Lambda)(int task, Environment *environment, void *data);

typedef struct {
  Lambda lambda;
  void *data;
  int32_t tasks;
  atomic_int next;
  atomic_int error;
} Job;

static void (*run_team)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
static int (*max_threads)(void);                                      /* omp_get_max_threads */
static int (*in_parallel)(void);                                      /* omp_in_parallel */

void mctune_set_openmp(void *team, void *threads, void *inside) {
  run_team = (void (*)(void (*)(void *), void *, unsigned, unsigned))team;
  max_threads = (int (*)(void))threads;
  in_parallel = (int (*)(void))inside;
}

static void work(void *argument) {
  Job *job = argument;
  Environment environment = {NULL, job->tasks};
  for (int task; (task = atomic_fetch_add(&job->next, 1)) < job->tasks;)
    if (job->lambda(task, &environment, job->data) != 0) atomic_store(&job->error, 1);
}

/* More shares than threads, taken in turn: a thread that is held up leaves its shares to the others. */
int mctune_parallel_launch(Lambda lambda, void *data, int tasks) {
  int threads = in_parallel() ? 1 : max_threads();
  Job job = {lambda, data, tasks > 0 ? tasks : (threads > 1 ? 8 * threads : 1), 0, 0};
  if (threads > 1 && job.tasks > 1)
    run_team(work, &job, (unsigned)threads, 0);
  else
    work(&job);
  return atomic_load(&job.error) ? -1 : 0;
}

/* Scratch: each thread keeps what it freed last, because large blocks from malloc fault in page by page. */
enum { KEPT = 32, ALIGNMENT = 64 };
static _Thread_local struct {
  void *block;
  size_t bytes;
} kept[KEPT];

void *mctune_alloc_workspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  size_t need = ((size_t)bytes + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; /* one more line holds the size */
  for (int i = 0; i < KEPT; ++i) {
    if (kept[i].block != NULL && kept[i].bytes >= need && kept[i].bytes <= 2 * need) {
      char *block = kept[i].block;
      kept[i].block = NULL;
      return block + ALIGNMENT;
    }
  }
  char *block = aligned_alloc(ALIGNMENT, need);
  if (block == NULL) return NULL;
  *(size_t *)block = need;
  return block + ALIGNMENT;
}

int mctune_free_workspace(int device_type, int device_id, void *scratch) {
  (void)device_type, (void)device_id;
  char *block = (char *)scratch - ALIGNMENT;
  for (int i = 0; i < KEPT; ++i) {
    if (kept[i].block == NULL) {
      kept[i].block = block;
      kept[i].bytes = *(size_t *)block;
      return 0;
    }
  }
  free(kept[0].block);
  kept[0].block = block;
  kept[0].bytes = *(size_t *)block;
  return 0;
}
