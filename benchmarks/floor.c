/* A start without any Python: producer, server, master and child, as bare as they can be. See floor.py.

       floor PORT ENQUEUE.LUA CLAIM.LUA GAP_US COUNT

   Prints, in microseconds, the median of each step: until the master has it, until the child has it, and in all. Without
   scripts (two empty paths) the producer publishes the message, and nobody keeps it. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 10000, WORDS = 24 };
typedef struct {
    volatile int ready, count;
    volatile double sent[MOST], heard[MOST], begun[MOST];
} Times;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static double now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

static int connected(int port) {
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons(port)};
    int it = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    inet_pton(AF_INET, "127.0.0.1", &where.sin_addr);
    if (connect(it, (struct sockaddr *)&where, sizeof where) < 0)
        die("connect");
    setsockopt(it, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return it;
}

/* Send a command. -> its reply, as it came */
static char *ask(int it, const char *const *words) {
    static char text[1 << 17];
    int count = 0, size = 0;
    while (words[count])
        count++;
    size = sprintf(text, "*%d\r\n", count);
    for (int n = 0; n < count; n++)
        size += sprintf(text + size, "$%zu\r\n%s\r\n", strlen(words[n]), words[n]);
    if (write(it, text, size) != size || (size = read(it, text, sizeof text - 1)) <= 0)
        die("the server");
    text[size] = 0;
    if (*text == '-') {
        fputs(text, stderr);
        exit(1);
    }
    return text;
}

/* -> the name under which the server knows the script */
static char *loaded(int it, const char *path) {
    static char text[1 << 16];
    FILE *file = fopen(path, "r");
    if (!file)
        die(path);
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    char *sha = strdup(strchr(ask(it, (const char *[]){"SCRIPT", "LOAD", text, NULL}), '\n') + 1);
    sha[40] = 0;
    return sha;
}

static void child(Times *times, const int *task) {
    char message[4096];
    close(task[1]);
    while (read(task[0], message, sizeof message) > 0)
        times->begun[times->count] = now_us();
    exit(0);
}

static void master(Times *times, int port, int task_w, const char *claim) {
    char push[4096];
    int pushes = connected(port), calls = connected(port);
    ask(pushes, (const char *[]){"SUBSCRIBE", "inbox:w", NULL});
    const char *words[] = {"EVALSHA", claim,  "10",     "leases", "active:w", "messages", "state", "pending", "ranked",
                           "due",     "wake", "paused", "idle",   "w",        "1",        "1",     "1",       NULL};
    if (*claim) {
        ask(calls, (const char *[]){"ZADD", "leases", "99999999999999", "w", NULL});
        ask(calls, words);
    }
    times->ready = 1;
    for (;;) {
        struct pollfd waited = {pushes, POLLIN, 0};
        poll(&waited, 1, -1);
        ssize_t size = read(pushes, push, sizeof push);
        times->heard[times->count] = now_us();
        if (size <= 0 || write(task_w, push, size) != size)
            exit(0);
        if (*claim)
            ask(calls, words); /* it is idle again */
    }
}

static int ascending(const void *a, const void *b) {
    double one = *(const double *)a, other = *(const double *)b;
    return one < other ? -1 : one > other;
}

static double median(const volatile double *from, const volatile double *to, int count) {
    static double took[MOST];
    for (int n = 0; n < count; n++)
        took[n] = to[n] - from[n];
    qsort(took, count, sizeof *took, ascending);
    return took[count / 2];
}

int main(int argc, char **argv) {
    if (argc != 6)
        return 2;
    int port = atoi(argv[1]), gap_us = atoi(argv[4]), count = atoi(argv[5]), task[2], it = connected(port);
    Times *times = mmap(NULL, sizeof *times, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (times == MAP_FAILED || count > MOST || pipe(task) < 0)
        die("floor");
    ask(it, (const char *[]){"FLUSHALL", NULL});
    const char *enqueue = *argv[2] ? loaded(it, argv[2]) : "", *claim = *argv[3] ? loaded(it, argv[3]) : "";
    pid_t children[] = {fork(), 0};
    if (!children[0])
        child(times, task);
    if (!(children[1] = fork()))
        master(times, port, task[1], claim);
    while (!times->ready)
        usleep(1000);
    char id[40], *body = "{\"task\":\"noop\"}\n[[1,\"hello\"],{}]";
    const char *call[WORDS] = {"EVALSHA", enqueue,  "7", "messages", "pending", "ranked", "due", "wake", "idle",
                               "paused",  "",       "active:", "inbox:", id, "0", "", body, NULL};
    for (int n = 0; n < count; n++) {
        usleep(gap_us);
        sprintf(id, "%032d", n);
        times->count = n;
        times->sent[n] = now_us();
        ask(it, *enqueue ? call : (const char *[]){"PUBLISH", "inbox:w", body, NULL});
    }
    usleep(gap_us);
    for (int n = 0; n < 2; n++) {
        kill(children[n], SIGKILL);
        waitpid(children[n], NULL, 0);
    }
    printf("%.0f %.0f %.0f\n", median(times->sent, times->heard, count), median(times->heard, times->begun, count),
           median(times->sent, times->begun, count));
    return 0;
}
