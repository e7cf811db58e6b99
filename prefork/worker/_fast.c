/* The compiled part of the hand-off, of both its ends. See fast.py. */

#include "_fast.h"

#define FORMAT 4 /* of what this and the Python around it expect of each other, as in fast.py */

static PyMethodDef functions[] = {
    {"run", child_run, METH_VARARGS, child_run_doc},
    {"frames", master_frames, METH_VARARGS, master_frames_doc},
    {"done", master_done, METH_VARARGS, master_done_doc},
    {"orders", master_orders, METH_VARARGS, master_orders_doc},
    {NULL, NULL, 0, NULL},
};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_fast", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__fast(void) {
    PyObject *module = init_child() < 0 ? NULL : PyModule_Create(&definition);
    if (module && PyModule_AddIntConstant(module, "FORMAT", FORMAT) < 0)
        Py_CLEAR(module);
    return module;
}
