/* The child's loop, as child.py and handoff.py have it, for what is usual. What is not, it leaves to them: before
   anything has been done with the message but to take its token, or when its task has ended. */

#include "_fast.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

static PyObject *s_buffer, *s_at, *s_running, *s_task, *s_task_id, *s_look_s, *s_peak_kib, *s_is_copy, *s_function,
    *s_finish, *s_acquire, *s_release, *s_empty, *s_zero;

int init_child(void) {
    struct {
        PyObject **where;
        const char *name;
    } names[] = {
        {&s_buffer, "_buffer"}, {&s_at, "_at"}, {&s_running, "running"}, {&s_task, "task"}, {&s_task_id, "task_id"},
        {&s_look_s, "_look_s"}, {&s_peak_kib, "_peak_kib"}, {&s_is_copy, "_is_copy"}, {&s_function, "function"},
        {&s_finish, "finish"}, {&s_acquire, "acquire"}, {&s_release, "release"}, {&s_empty, ""},
    };
    for (size_t n = 0; n < sizeof names / sizeof *names; n++)
        if (!(*names[n].where = PyUnicode_InternFromString(names[n].name)))
            return -1;
    return (s_zero = PyLong_FromLong(0)) ? 0 : -1;
}

/* The exception that is set, as an object; it is set no more. */
static PyObject *raised(void) {
#if PY_VERSION_HEX >= 0x030c0000
    return PyErr_GetRaisedException();
#else
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (trace)
        PyException_SetTraceback(value, trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    return value;
#endif
}

static int set_number(PyObject *object, PyObject *name, unsigned long long number) {
    PyObject *it = PyLong_FromUnsignedLongLong(number);
    int failed = !it || PyObject_SetAttr(object, name, it) < 0;
    Py_XDECREF(it);
    return failed ? -1 : 0;
}

static double get_float(PyObject *object, PyObject *name) {
    PyObject *it = PyObject_GetAttr(object, name);
    double value = it ? PyFloat_AsDouble(it) : -1.0;
    Py_XDECREF(it);
    return value;
}

static double call_float(PyObject *function, PyObject *argument) {
    PyObject *it = PyObject_CallOneArg(function, argument);
    double value = it ? PyFloat_AsDouble(it) : -1.0;
    Py_XDECREF(it);
    return value;
}

/* Wait for a token. -> 1, 0: there will be none any more, -1: an error */
static int next_token(int fd, uint64_t *number) {
    for (;;) {
        ssize_t got = read(fd, number, sizeof *number); /* exactly one: what is read can't be taken back */
        if (got == sizeof *number)
            return 1;
        if (got == 0)
            return 0;
        if (got > 0) {
            PyErr_SetString(PyExc_ValueError, "half a token");
            return -1;
        }
        if (errno == EAGAIN) {
            struct pollfd waited = {fd, POLLIN, 0};
            int found;
            Py_BEGIN_ALLOW_THREADS
            found = poll(&waited, 1, -1);
            Py_END_ALLOW_THREADS
            if (found >= 0)
                continue;
        }
        if (errno != EINTR) {
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        if (PyErr_CheckSignals() < 0)
            return -1;
    }
}

/* Have so much of the buffer, behind the place where the next frame begins. -> 1; 0: the master is gone; -1: an error */
static int fill(int fd, PyObject **buffer, Py_ssize_t *at, Py_ssize_t size) {
    static char room[READ_BYTES];
    Py_ssize_t have;
    while ((have = PyBytes_GET_SIZE(*buffer) - *at) < size) {
        ssize_t got;
        int why;
        Py_BEGIN_ALLOW_THREADS
        got = read(fd, room, sizeof room);
        why = errno;
        Py_END_ALLOW_THREADS
        if (got == 0)
            return 0;
        if (got < 0 && why == EINTR) {
            if (PyErr_CheckSignals() < 0)
                return -1;
            continue;
        }
        errno = why;
        PyObject *joined = got < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyBytes_FromStringAndSize(NULL, have + got);
        if (!joined)
            return -1;
        memcpy(PyBytes_AS_STRING(joined), PyBytes_AS_STRING(*buffer) + *at, have);
        memcpy(PyBytes_AS_STRING(joined) + have, room, got);
        Py_SETREF(*buffer, joined);
        *at = 0;
    }
    return 1;
}

/* What a task has returned, as Python's path would write it. -> its size; -1: that path has to look at it */
static Py_ssize_t encode(PyObject *dumps, PyObject *value, char *payload) {
    if (value == Py_None) {
        memcpy(payload, "null", 4);
        return 4;
    }
    PyObject *raw = PyObject_CallOneArg(dumps, value);
    Py_ssize_t size = raw && PyBytes_CheckExact(raw) ? PyBytes_GET_SIZE(raw) : -1;
    if (size > MOST_PAYLOAD)
        size = -1;
    if (size >= 0)
        memcpy(payload, PyBytes_AS_STRING(raw), size);
    for (Py_ssize_t at = 0; at + 4 <= size; at++) /* it may stand for a NaN, which is an error */
        if (payload[at] == 'n' && !memcmp(payload + at, "null", 4))
            size = -1;
    Py_XDECREF(raw);
    PyErr_Clear();
    return size;
}

static int write_answer(int fd, PyObject *lock, const char *answer, size_t size) {
    PyObject *it = PyObject_CallMethodNoArgs(lock, s_acquire);
    if (!it)
        return -1;
    Py_DECREF(it);
    size_t at = 0;
    int failed = 0;
    while (at < size && !failed) {
        ssize_t written;
        int why;
        Py_BEGIN_ALLOW_THREADS
        written = write(fd, answer + at, size - at);
        why = errno;
        Py_END_ALLOW_THREADS
        if (written >= 0)
            at += written;
        else if (why == EINTR)
            failed = PyErr_CheckSignals() < 0;
        else {
            errno = why;
            PyErr_SetFromErrno(PyExc_OSError);
            failed = 1;
        }
    }
    PyObject *error = failed ? raised() : NULL; /* `release` is not to be called with one that is set */
    it = PyObject_CallMethodNoArgs(lock, s_release);
    Py_XDECREF(it);
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return failed || !it ? -1 : 0;
}

/* Whether an integer of more than 64 bits may be in it, of which orjson makes a float. Of the 19 digits or more that it
   has, two are every ninth byte. */
static int may_be_rounded(const char *body, uint32_t size) {
    for (uint32_t at = 9; at < size; at += 9)
        if (Py_ISDIGIT(Py_CHARMASK(body[at])) && Py_ISDIGIT(Py_CHARMASK(body[at - 9])))
            return 1;
    return 0;
}

/* The arguments of a body that is [args, kwargs]. -> 0; -1: it is something else, which Python says better */
static int decode(PyObject *loads, const char *body, uint32_t size, PyObject **args, PyObject **kwargs) {
    PyObject *raw = PyBytes_FromStringAndSize(body, size), *both = raw ? PyObject_CallOneArg(loads, raw) : NULL;
    Py_XDECREF(raw);
    *args = *kwargs = NULL;
    if (both && PyList_CheckExact(both) && PyList_GET_SIZE(both) == 2 && PyList_CheckExact(PyList_GET_ITEM(both, 0)) &&
        PyDict_CheckExact(PyList_GET_ITEM(both, 1))) {
        *args = PyList_AsTuple(PyList_GET_ITEM(both, 0));
        *kwargs = Py_NewRef(PyList_GET_ITEM(both, 1));
    }
    Py_XDECREF(both);
    if (*args)
        return 0;
    Py_CLEAR(*kwargs);
    PyErr_Clear();
    return -1;
}

/* What comes after a task that has returned: how long it ran (since minus `ran_s`), what it took, what it printed. */
static int end_task(PyObject *child, PyObject *clock, PyObject *look, PyObject *prints, Answer *answer) {
    PyObject *copy = PyObject_GetAttr(child, s_is_copy);
    if (!copy)
        return -1;
    Py_DECREF(copy);
    if (copy != Py_False) /* the task has forked, and this copy has returned from it too */
        _exit(0);
    PyObject *now = PyObject_CallNoArgs(clock);
    double now_s = now ? PyFloat_AsDouble(now) : -1.0, look_s = PyErr_Occurred() ? -1.0 : get_float(child, s_look_s);
    if (!PyErr_Occurred() && now_s >= look_s)
        answer->cpu_s = call_float(look, now);
    int failed = PyErr_Occurred() != NULL;
    Py_XDECREF(now);
    for (Py_ssize_t n = 0; !failed && n < PyTuple_GET_SIZE(prints); n++) {
        PyObject *it = PyObject_CallMethodNoArgs(PyTuple_GET_ITEM(prints, n), s_finish);
        failed = !it;
        Py_XDECREF(it);
    }
    PyObject *peak = failed ? NULL : PyObject_GetAttr(child, s_peak_kib);
    answer->peak_kib = peak ? (uint32_t)PyLong_AsUnsignedLong(peak) : 0;
    Py_XDECREF(peak);
    answer->ran_s += now_s;
    return PyErr_Occurred() ? -1 : 0;
}

const char child_run_doc[] = PyDoc_STR(
"run(child, end, task_r, token_r, answer_w, lock, log, stopper, tasks, prints, loads, dumps, clock, look)\n--\n\n"
"Run and answer messages as long as they are usual. `tasks`: for each (task, name, whether it keeps its result), or None.\n\n"
"-> (number, None, None, None): that one has its token and is still to be run; (number, begun_s, value, error): it\n"
"was run, and is to be answered; None: no more tokens. In both cases its frame is still the next one in `end`, of which\n"
"a large one has not been read to its end, nor one whose number is another.");

PyObject *child_run(PyObject *module, PyObject *given) {
    PyObject *child, *end, *lock, *log, *stopper, *tasks, *prints, *loads, *dumps, *clock, *look, *buffer = NULL, *back = NULL;
    int task_r, token_r, answer_w, more;
    Py_ssize_t at = 0;
    Frame frame;
    if (!PyArg_ParseTuple(given, "OOiiiOOOO!O!OOOO:run", &child, &end, &task_r, &token_r, &answer_w, &lock, &log, &stopper,
                          &PyTuple_Type, &tasks, &PyTuple_Type, &prints, &loads, &dumps, &clock, &look))
        return NULL;
    uint64_t number;
    if (!(back = PyObject_GetAttr(end, s_at)))
        return NULL;
    at = PyLong_AsSsize_t(back);
    Py_CLEAR(back);
    if ((at == -1 && PyErr_Occurred()) || !(buffer = PyObject_GetAttr(end, s_buffer)))
        return NULL;
    if (!PyBytes_Check(buffer) || at < 0 || at > PyBytes_GET_SIZE(buffer)) {
        PyErr_SetString(PyExc_TypeError, "no bytes, or no place in them");
        goto out;
    }
    while ((more = next_token(token_r, &number)) > 0) {
        if ((more = fill(task_r, &buffer, &at, sizeof frame)) <= 0)
            break;
        memcpy(&frame, PyBytes_AS_STRING(buffer) + at, sizeof frame);
        int small = frame.number == number && frame.size < READ_BYTES;
        if (small && (more = fill(task_r, &buffer, &at, sizeof frame + frame.size)) <= 0)
            break;
        const char *data = PyBytes_AS_STRING(buffer) + at + sizeof frame;
        PyObject *task = NULL, *id = NULL, *args = NULL, *kwargs = NULL, *begun = NULL, *value, *error = NULL;
        double begun_s;
        Answer answer = {number, DONE, 0, 0.0, 0.0, 0};
        char out[sizeof answer + MOST_PAYLOAD];
        Py_ssize_t payload = 0;
        if (small && !frame.flags && frame.soft_timeout_s == 0.0 && frame.task < PyTuple_GET_SIZE(tasks) &&
            !may_be_rounded(data, frame.size))
            task = PyTuple_GET_ITEM(tasks, frame.task);
        if (!task || !PyTuple_Check(task) || PyTuple_GET_SIZE(task) != 3) {
            back = Py_BuildValue("KOOO", (unsigned long long)number, Py_None, Py_None, Py_None);
            break;
        }
        size_t length = sizeof frame.id;
        while (length && !frame.id[length - 1])
            length--;
        id = PyUnicode_DecodeUTF8(frame.id, length, "replace");
        if (!id || PyObject_SetAttr(log, s_task, PyTuple_GET_ITEM(task, 1)) < 0 ||
            PyObject_SetAttr(log, s_task_id, id) < 0)
            goto failed;
        if (!(begun = PyObject_CallNoArgs(clock)) || ((begun_s = PyFloat_AsDouble(begun)) == -1.0 && PyErr_Occurred()))
            goto failed;
        if (decode(loads, data, frame.size, &args, &kwargs) < 0) {
            back = Py_BuildValue("KOOO", (unsigned long long)number, Py_None, Py_None, Py_None);
            goto failed;
        }
        if (set_number(stopper, s_running, number) < 0)
            goto failed;
        PyObject *function = PyObject_GetAttr(PyTuple_GET_ITEM(task, 0), s_function);
        value = function ? PyObject_Call(function, args, kwargs) : NULL;
        if (!value)
            PyErr_SetHandledException(error = raised()); /* the context of what a signal's handler raises */
        else if (PyTuple_GET_ITEM(task, 2) == Py_True)
            payload = encode(dumps, value, out + sizeof answer);
        if (PyErr_CheckSignals() < 0) { /* one that came at its very end is still the task's */
            Py_XSETREF(error, raised());
            Py_CLEAR(value);
        }
        if (error)
            PyErr_SetHandledException(NULL);
        Py_XDECREF(function);
        if (PyObject_SetAttr(stopper, s_running, s_zero) < 0) {
            Py_XDECREF(value);
            Py_XDECREF(error);
            goto failed;
        }
        if (error || payload < 0) {
            back = Py_BuildValue("KOOO", (unsigned long long)number, begun, value ? value : Py_None,
                                 error ? error : Py_None);
            Py_XDECREF(value);
            Py_XDECREF(error);
            goto failed;
        }
        Py_DECREF(value);
        Py_CLEAR(args);
        Py_CLEAR(kwargs);
        at += sizeof frame + frame.size;
        answer.ran_s = -begun_s;
        answer.size = (uint32_t)payload;
        if (end_task(child, clock, look, prints, &answer) < 0 || PyObject_SetAttr(log, s_task, s_empty) < 0)
            goto failed;
        memcpy(out, &answer, sizeof answer);
        if (write_answer(answer_w, lock, out, sizeof answer + payload) < 0)
            goto failed;
        Py_DECREF(id);
        Py_DECREF(begun);
        continue;
    failed:
        Py_XDECREF(id);
        Py_XDECREF(begun);
        Py_XDECREF(args);
        Py_XDECREF(kwargs);
        break;
    }
    if (more == 0)
        back = Py_NewRef(Py_None);
out:
    if (back && (PyObject_SetAttr(end, s_buffer, buffer) < 0 || set_number(end, s_at, at) < 0))
        Py_CLEAR(back);
    Py_DECREF(buffer);
    return back;
}
