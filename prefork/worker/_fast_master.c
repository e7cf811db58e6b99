/* The master's part: frames, answers and orders, as frames.py, handoff.py, intake.py and work.py do them, for what is
   usual. What is not is left to them, and nothing has been done about it. */

#include "_fast.h"

#include <math.h>
#include <structmember.h>

/* As in message.py, frames.py, intake.py, work.py and dispatch.py. */
enum { LARGE_BYTES = 1 << 14, LONGEST_CACHED = 1024 };
static const double LONGEST_S = 1e10, PASSAGE_S = 1e-9, OVERHEAD_S = 10e-6;
static const long long LATEST_MS = 253402300799999;

/* Where the slots of a class are: to ask for them by name would take longer than all that is done with them. */
typedef struct {
    const char *module, *name;
    int whole; /* whether instances are made here, so that all of its slots have to be known */
    const char *slots[10];
    PyTypeObject *type;
    Py_ssize_t at[10];
} Class;
static Class message_c = {"prefork.message", "Message", 1,
                          {"id", "queue", "header", "body", "enqueued_ms", "priority", "state"}, NULL, {0}};
static Class header_c = {"prefork.message", "Header", 0, {"task"}, NULL, {0}};
static Class order_c = {"prefork.worker.frames", "Order", 1,
                        {"message", "terms", "attempt", "retried", "expected_s", "serial", "flags", "ready_since_s",
                         "cancelled"}, NULL, {0}};
static Class terms_c = {"prefork.worker.frames", "Terms", 0,
                        {"task", "queue", "max_retries", "timeout_s", "soft_timeout_s", "result_ttl_ms"}, NULL, {0}};
enum { ID, QUEUE, HEADER, BODY, ENQUEUED_MS, PRIORITY, STATE };
enum { NAME };
enum { MESSAGE, TERMS, ATTEMPT, RETRIED, EXPECTED_S, SERIAL, FLAGS, READY_SINCE_S, CANCELLED };
enum { T_TASK, T_QUEUE, T_MAX_RETRIES, T_TIMEOUT_S, T_SOFT_TIMEOUT_S, T_RESULT_TTL_MS };
#define SLOT(object, class, slot) (*(PyObject **)((char *)(object) + (class).at[slot]))
#define IS(object, class) ((object) && Py_TYPE(object) == (class).type)

static int know(Class *it) {
    if (it->type)
        return 0;
    PyObject *module = PyImport_ImportModule(it->module);
    PyObject *type = module ? PyObject_GetAttrString(module, it->name) : NULL;
    PyObject *all = type ? PyObject_GetAttrString(type, "__slots__") : NULL;
    int count = 0, known = all && PyType_Check(type) && PyTuple_Check(all);
    for (; known && count < 10 && it->slots[count]; count++) {
        PyObject *slot = PyObject_GetAttrString(type, it->slots[count]);
        int is_slot = slot && Py_TYPE(slot) == &PyMemberDescr_Type;
        PyMemberDef *member = is_slot ? ((PyMemberDescrObject *)slot)->d_member : NULL;
        known = member && member->type == T_OBJECT_EX;
        it->at[count] = known ? member->offset : 0;
        Py_XDECREF(slot);
    }
    if (known && !(it->whole && PyTuple_GET_SIZE(all) != count))
        it->type = (PyTypeObject *)Py_NewRef(type); /* for good, as the class itself */
    else if (!PyErr_Occurred())
        PyErr_Format(PyExc_TypeError, "%s.%s is not as it was when this was built", it->module, it->name);
    Py_XDECREF(all);
    Py_XDECREF(type);
    Py_XDECREF(module);
    return it->type ? 0 : -1;
}

static int know_all(void) {
    return know(&message_c) < 0 || know(&header_c) < 0 || know(&order_c) < 0 || know(&terms_c) < 0 ? -1 : 0;
}

static int is_order(PyObject *order) {
    return IS(order, order_c) && IS(SLOT(order, order_c, MESSAGE), message_c) &&
           IS(SLOT(order, order_c, TERMS), terms_c);
}

static int whole(PyObject *it, uint64_t most, uint64_t *value) {
    if (!it || !PyLong_CheckExact(it))
        return 0;
    *value = PyLong_AsUnsignedLongLong(it);
    if (*value == (uint64_t)-1 && PyErr_Occurred()) {
        PyErr_Clear();
        return 0;
    }
    return *value <= most;
}

static int real(PyObject *it, double *value) {
    if (!it || !(PyFloat_CheckExact(it) || PyLong_CheckExact(it)))
        return 0;
    *value = PyFloat_AsDouble(it);
    if (*value == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        return 0;
    }
    return 1;
}

static int pack(PyObject *order, uint64_t number, Frame *frame) {
    PyObject *message = SLOT(order, order_c, MESSAGE), *terms = SLOT(order, order_c, TERMS);
    PyObject *name = SLOT(message, message_c, ID);
    uint64_t task, queue, flags, attempt, retried, max_retries, enqueued_ms;
    double timeout_s, soft_timeout_s;
    if (!whole(SLOT(terms, terms_c, T_TASK), 0xFFFF, &task) || !whole(SLOT(terms, terms_c, T_QUEUE), 0xFFFF, &queue) ||
        !whole(SLOT(order, order_c, FLAGS), 0xFFFF, &flags) ||
        !whole(SLOT(order, order_c, ATTEMPT), UINT32_MAX, &attempt) ||
        !whole(SLOT(order, order_c, RETRIED), UINT32_MAX, &retried) ||
        !whole(SLOT(terms, terms_c, T_MAX_RETRIES), UINT32_MAX, &max_retries) ||
        !real(SLOT(terms, terms_c, T_TIMEOUT_S), &timeout_s) ||
        !real(SLOT(terms, terms_c, T_SOFT_TIMEOUT_S), &soft_timeout_s) ||
        !whole(SLOT(message, message_c, ENQUEUED_MS), UINT64_MAX, &enqueued_ms) || !name || !PyUnicode_CheckExact(name))
        return 0;
    Py_ssize_t length;
    const char *id = PyUnicode_AsUTF8AndSize(name, &length);
    if (!id) {
        PyErr_Clear();
        return 0;
    }
    *frame = (Frame){number, (uint32_t)PyBytes_GET_SIZE(SLOT(message, message_c, BODY)), (uint16_t)task,
                     (uint16_t)queue, (uint16_t)flags, (uint32_t)attempt, (uint32_t)retried, (uint32_t)max_retries,
                     timeout_s, soft_timeout_s, enqueued_ms, {0}};
    memcpy(frame->id, id, length < (Py_ssize_t)sizeof frame->id ? (size_t)length : sizeof frame->id);
    return 1;
}

const char master_frames_doc[] = PyDoc_STR(
"frames(orders, first)\n--\n\n"
"The frames of orders that are numbered from `first` on; None if one of them is unusual, as a large one is.");

PyObject *master_frames(PyObject *module, PyObject *given) {
    PyObject *orders, *out;
    unsigned long long first;
    if (!PyArg_ParseTuple(given, "O!K:frames", &PyList_Type, &orders, &first) || know_all() < 0)
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(orders), size = 0;
    for (Py_ssize_t n = 0; n < count; n++) {
        PyObject *order = PyList_GET_ITEM(orders, n);
        PyObject *body = is_order(order) ? SLOT(SLOT(order, order_c, MESSAGE), message_c, BODY) : NULL;
        if (!body || !PyBytes_CheckExact(body) || PyBytes_GET_SIZE(body) >= READ_BYTES)
            Py_RETURN_NONE;
        size += sizeof(Frame) + PyBytes_GET_SIZE(body);
    }
    if (!(out = PyBytes_FromStringAndSize(NULL, size)))
        return NULL;
    char *at = PyBytes_AS_STRING(out);
    for (Py_ssize_t n = 0; n < count; n++) {
        Frame frame;
        PyObject *order = PyList_GET_ITEM(orders, n), *body = SLOT(SLOT(order, order_c, MESSAGE), message_c, BODY);
        if (!pack(order, first + n, &frame)) {
            Py_DECREF(out);
            Py_RETURN_NONE;
        }
        memcpy(at, &frame, sizeof frame);
        memcpy(at + sizeof frame, PyBytes_AS_STRING(body), frame.size);
        at += sizeof frame + frame.size;
    }
    return out;
}

/* The mean and mean deviation that RunTimes keeps of a task's name. -> the list that they are in, or NULL */
static PyObject *times_of(PyObject *known, PyObject *name, double *mean, double *deviation) {
    PyObject *it = name ? PyDict_GetItemWithError(known, name) : NULL;
    return it && PyList_CheckExact(it) && PyList_GET_SIZE(it) == 2 && real(PyList_GET_ITEM(it, 0), mean) &&
           real(PyList_GET_ITEM(it, 1), deviation) ? it : NULL;
}

static int set_item(PyObject *list, Py_ssize_t at, double value) {
    PyObject *it = PyFloat_FromDouble(value);
    return it ? PyList_SetItem(list, at, it) : -1;
}

/* The record of a success as settlement.py makes it, of a task whose name needs no escapes; NULL also if it is not so. */
static PyObject *success(PyObject *message, PyObject *name, const Answer *it, const char *value, long long now_ms) {
    char begin[512];
    uint64_t enqueued_ms;
    Py_ssize_t length;
    const char *text = PyUnicode_CheckExact(name) ? PyUnicode_AsUTF8AndSize(name, &length) : NULL;
    if (!text)
        PyErr_Clear();
    if (!text || length > 256 || !whole(SLOT(message, message_c, ENQUEUED_MS), LATEST_MS, &enqueued_ms))
        return NULL;
    for (Py_ssize_t n = 0; n < length; n++)
        if ((unsigned char)text[n] < ' ' || text[n] == '"' || text[n] == '\\')
            return NULL;
    long long began_ms = (long long)enqueued_ms;
    if (now_ms < began_ms)
        now_ms = began_ms;
    if (now_ms - (long long)rint(it->ran_s * 1000) > began_ms)
        began_ms = now_ms - (long long)rint(it->ran_s * 1000);
    char *ran = PyOS_double_to_string(it->ran_s, 'f', 6, 0, NULL); /* snprintf has the commas of some languages */
    if (!ran)
        return NULL;
    int size = snprintf(begin, sizeof begin,
                        "{\"status\":\"SUCCESSFUL\",\"task\":\"%s\",\"attempts\":1,\"enqueued_ms\":%llu,"
                        "\"started_ms\":%lld,\"finished_ms\":%lld,\"ran_s\":%s,\"value\":",
                        text, (unsigned long long)enqueued_ms, began_ms, now_ms, ran);
    PyMem_Free(ran);
    PyObject *record = size < (int)sizeof begin ? PyBytes_FromStringAndSize(NULL, size + it->size + 1) : NULL;
    if (!record)
        return NULL;
    memcpy(PyBytes_AS_STRING(record), begin, size);
    memcpy(PyBytes_AS_STRING(record) + size, value, it->size);
    PyBytes_AS_STRING(record)[size + it->size] = '}';
    return record;
}

const char master_done_doc[] = PyDoc_STR(
"done(data, unanswered, outboxes, known, mix_s, now_ms)\n--\n\n"
"Settle the answers at the beginning of `data` that are usual: done, at the first attempt if there is a result to keep.\n"
"Their ids go to the lists `plain` of their outboxes, or with their results to `records`; what they took into `known`.\n\n"
"-> bytes of `data` that are done with, orders among them, seconds that these were expected to take, the largest peak\n"
"memory in KiB, the new `mix_s`");

PyObject *master_done(PyObject *module, PyObject *given) {
    PyObject *unanswered, *outboxes, *known, *last_queue = NULL, *plain = NULL, *records = NULL, *done = NULL;
    const char *data;
    Py_ssize_t size, at = 0, orders = 0;
    double mix_s, load_s = 0.0;
    long long now_ms;
    uint32_t peak_kib = 0;
    if (!PyArg_ParseTuple(given, "y#O!O!O!dL:done", &data, &size, &PyDict_Type, &unanswered, &PyDict_Type, &outboxes,
                          &PyDict_Type, &known, &mix_s, &now_ms) || know_all() < 0 ||
        !(done = PyUnicode_InternFromString("done")))
        return NULL;
    while (size - at >= (Py_ssize_t)sizeof(Answer)) {
        Answer it;
        double mean, deviation, expected_s;
        memcpy(&it, data + at, sizeof it);
        int told = it.ran_s >= 0 && it.ran_s < LONGEST_S && it.cpu_s >= -1 && it.cpu_s < LONGEST_S;
        if (it.kind != DONE || it.size > MOST_PAYLOAD || size - at - (Py_ssize_t)sizeof it < it.size || !told)
            break;
        PyObject *number = PyLong_FromUnsignedLongLong(it.number);
        PyObject *order = number ? PyDict_GetItemWithError(unanswered, number) : NULL;
        if (!order) { /* one that is not due says nothing */
            Py_XDECREF(number);
            if (PyErr_Occurred())
                break;
        } else {
            PyObject *message = is_order(order) ? SLOT(order, order_c, MESSAGE) : NULL;
            PyObject *header = message ? SLOT(message, message_c, HEADER) : NULL, *times = NULL;
            PyObject *ttl_ms = message ? SLOT(SLOT(order, order_c, TERMS), terms_c, T_RESULT_TTL_MS) : NULL;
            if (IS(header, header_c) && ttl_ms && PyLong_CheckExact(ttl_ms) &&
                real(SLOT(order, order_c, EXPECTED_S), &expected_s) && expected_s < LONGEST_S)
                times = times_of(known, SLOT(header, header_c, NAME), &mean, &deviation);
            PyObject *queue = times ? SLOT(message, message_c, QUEUE) : NULL;
            PyObject *body = times ? SLOT(message, message_c, BODY) : NULL;
            PyObject *id = times ? SLOT(message, message_c, ID) : NULL;
            if (queue && queue != last_queue) {
                PyObject *outbox = PyDict_GetItemWithError(outboxes, queue);
                Py_XSETREF(plain, outbox ? PyObject_GetAttrString(outbox, "plain") : NULL);
                Py_XSETREF(records, plain ? PyObject_GetAttrString(outbox, "records") : NULL);
                Py_XSETREF(last_queue, Py_NewRef(queue));
            }
            Py_ssize_t length = body && !PyErr_Occurred() ? PyObject_Size(body) : -1;
            if (length < 0 || !id || !plain || !PyList_CheckExact(plain) || !records || !PyList_CheckExact(records)) {
                Py_DECREF(number);
                break;
            }
            PyObject *outcome = NULL;
            if (PyObject_IsTrue(ttl_ms)) {
                PyObject *record = NULL;
                if (it.size && SLOT(message, message_c, STATE) == Py_None)
                    record = success(message, SLOT(header, header_c, NAME), &it, data + at + sizeof it, now_ms);
                outcome = record ? Py_BuildValue("(O(OOON))", id, done, id, ttl_ms, record) : NULL;
            } else if (!it.size)
                outcome = Py_NewRef(id);
            if (!outcome) {
                Py_DECREF(number);
                break;
            }
            double ran_s = it.ran_s + (double)length * PASSAGE_S + OVERHEAD_S, off_s = ran_s - mean;
            int failed = PyList_Append(outcome == id ? plain : records, outcome) < 0 ||
                         set_item(times, 0, mean + off_s / 8) < 0 ||
                         set_item(times, 1, deviation + (fabs(off_s) - deviation) / 4) < 0 ||
                         PyDict_DelItem(unanswered, number) < 0;
            Py_DECREF(outcome);
            Py_DECREF(number);
            if (failed)
                break;
            mix_s = mix_s == Py_HUGE_VAL ? ran_s : mix_s + (ran_s - mix_s) / 8;
            load_s += expected_s;
            orders++;
        }
        if (it.peak_kib > peak_kib)
            peak_kib = it.peak_kib;
        at += sizeof it + it.size;
    }
    Py_XDECREF(plain);
    Py_XDECREF(records);
    Py_XDECREF(last_queue);
    Py_DECREF(done);
    return PyErr_Occurred() ? NULL : Py_BuildValue("nndkd", at, orders, load_s, (unsigned long)peak_kib, mix_s);
}

/* The number of at most so many digits that a space ends. -> what is behind that, or NULL */
static const char *digits(const char *at, const char *end, int most, long long *value) {
    const char *begin = at;
    for (*value = 0; at < end && at - begin < most && Py_ISDIGIT(Py_CHARMASK(*at)); at++)
        *value = *value * 10 + (*at - '0');
    return at > begin && at < end && *at == ' ' ? at + 1 : NULL;
}

/* The head of a message as most have it. -> where its line ends, or NULL; `head`: where its header begins */
static const char *parse(PyObject *raw, const char **head, long long *enqueued_ms, long long *priority) {
    const char *begin = PyBytes_AS_STRING(raw), *end = begin + PyBytes_GET_SIZE(raw), *line;
    if (end - begin >= LARGE_BYTES || end - begin < 2 || memcmp(begin, "1 ", 2) ||
        !(*head = digits(begin + 2, end, 15, enqueued_ms)))
        return NULL;
    int negative = *head < end && **head == '-';
    if (!(*head = digits(*head + negative, end, 3, priority)) || !(line = memchr(*head, '\n', end - *head)))
        return NULL;
    if (negative)
        *priority = -*priority;
    int known = line - begin <= LONGEST_CACHED && *enqueued_ms <= LATEST_MS && *priority >= -100 && *priority <= 100;
    return known ? line : NULL;
}

/* A new instance with these values in its slots, which are taken over; NULL if one of them is, or memory is short. */
static PyObject *make(Class *class, int count, PyObject **values) {
    int whole = 1;
    for (int n = 0; n < count; n++)
        whole = whole && values[n];
    PyObject *it = whole ? class->type->tp_alloc(class->type, 0) : NULL;
    for (int n = 0; n < count; n++)
        if (it)
            SLOT(it, *class, n) = values[n];
        else
            Py_XDECREF(values[n]);
    return it;
}

const char master_orders_doc[] = PyDoc_STR(
"orders(ids, messages, states, queue, serial, usual, known, long_s)\n--\n\n"
"The orders for what a claim has brought, and how many are missing: None stands for what is unusual.\n"
"`usual`: the header as bytes -> (header, terms); `known`: of RunTimes; `long_s`: beyond that a task gets a title.");

PyObject *master_orders(PyObject *module, PyObject *given) {
    PyObject *ids, *raws, *states, *queue, *usual, *known, *pair = NULL, *expected = NULL;
    const char *last = NULL;
    Py_ssize_t last_size = 0, missing = 0;
    long long serial;
    double long_s, expected_s = 0.0;
    if (!PyArg_ParseTuple(given, "O!O!O!ULO!O!d:orders", &PyList_Type, &ids, &PyList_Type, &raws, &PyList_Type, &states,
                          &queue, &serial, &PyDict_Type, &usual, &PyDict_Type, &known, &long_s) || know_all() < 0)
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(ids);
    if (PyList_GET_SIZE(raws) != count || PyList_GET_SIZE(states) != count)
        return PyErr_Format(PyExc_ValueError, "not as many ids as messages and states");
    PyObject *out = PyList_New(count);
    for (Py_ssize_t n = 0; out && n < count; n++) {
        PyObject *raw = PyList_GET_ITEM(raws, n), *raw_id = PyList_GET_ITEM(ids, n), *order = NULL, *id = NULL;
        long long enqueued_ms = 0, priority = 0;
        const char *head = NULL, *line = NULL;
        if (PyBytes_CheckExact(raw) && PyBytes_CheckExact(raw_id) && PyList_GET_ITEM(states, n) == Py_None)
            line = parse(raw, &head, &enqueued_ms, &priority);
        if (line && (line - head != last_size || !last || memcmp(head, last, last_size))) {
            PyObject *key = PyBytes_FromStringAndSize(head, line - head);
            Py_XSETREF(pair, key ? Py_XNewRef(PyDict_GetItemWithError(usual, key)) : NULL);
            Py_XDECREF(key);
            last = head, last_size = line - head;
            Py_CLEAR(expected);
            if (pair && PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2 && IS(PyTuple_GET_ITEM(pair, 0), header_c)) {
                double mean, deviation;
                int seen = times_of(known, SLOT(PyTuple_GET_ITEM(pair, 0), header_c, NAME), &mean, &deviation) != NULL;
                expected_s = seen ? mean + 2 * deviation : Py_HUGE_VAL;
                expected = PyErr_Occurred() ? NULL : PyFloat_FromDouble(expected_s);
            }
        }
        if (line && expected && !(id = PyUnicode_DecodeUTF8(PyBytes_AS_STRING(raw_id), PyBytes_GET_SIZE(raw_id), NULL)))
            PyErr_Clear();
        if (id) {
            Py_ssize_t rest = PyBytes_AS_STRING(raw) + PyBytes_GET_SIZE(raw) - (line + 1);
            PyObject *message = make(&message_c, 7, (PyObject *[]){
                id, Py_NewRef(queue), Py_NewRef(PyTuple_GET_ITEM(pair, 0)), PyBytes_FromStringAndSize(line + 1, rest),
                PyLong_FromLongLong(enqueued_ms), PyLong_FromLongLong(priority), Py_NewRef(Py_None)});
            order = make(&order_c, 9, (PyObject *[]){
                message, Py_NewRef(PyTuple_GET_ITEM(pair, 1)), PyLong_FromLong(1), PyLong_FromLong(0),
                Py_NewRef(expected), PyLong_FromLongLong(serial + n), PyLong_FromLong(expected_s > long_s),
                PyFloat_FromDouble(0.0), Py_NewRef(Py_False)});
        }
        if (!order && !PyErr_Occurred()) {
            order = Py_NewRef(Py_None);
            missing++;
        }
        if (order)
            PyList_SET_ITEM(out, n, order);
        else
            Py_CLEAR(out);
    }
    Py_XDECREF(pair);
    Py_XDECREF(expected);
    return out ? Py_BuildValue("Nn", out, missing) : NULL;
}
