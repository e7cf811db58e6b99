/* What both ends of the hand-off have in common; see fast.py and handoff.py. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if PY_BIG_ENDIAN
#error "frames and answers are little-endian; there is the pure path"
#endif

#pragma pack(push, 1)
typedef struct {
    uint64_t number;
    uint32_t size;
    uint16_t task, queue, flags;
    uint32_t attempt, retried, max_retries;
    double timeout_s, soft_timeout_s;
    uint64_t enqueued_ms;
    char id[32];
} Frame;
typedef struct {
    uint64_t number;
    uint8_t kind;
    uint32_t size;
    double ran_s, cpu_s;
    uint32_t peak_kib;
} Answer;
#pragma pack(pop)

enum { DONE = 1, READ_BYTES = 1 << 16, MOST_PAYLOAD = 2048 };

int init_child(void);
PyObject *child_run(PyObject *module, PyObject *given);
extern const char child_run_doc[];

PyObject *master_frames(PyObject *module, PyObject *given);
PyObject *master_done(PyObject *module, PyObject *given);
PyObject *master_orders(PyObject *module, PyObject *given);
extern const char master_frames_doc[], master_done_doc[], master_orders_doc[];
