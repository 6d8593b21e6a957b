/* A libnvidia-ml.so.1 whose world is a text file (FLOWMESH_NVML_STUB), read anew at every call, so that a test can
 * change the hardware under a running program. One statement a line; words are separated by spaces:
 *
 *   driver VERSION                 cuda NUMBER (12080 is 12.8)
 *   init CODE                      what nvmlInit answers
 *   forget N                       when N changes, the library loses its initialisation, as after a driver reload
 *   gpu UUID TOTAL NAME...         a device; its place in the file is its index
 *   mig BOARD UUID TOTAL GI CI     a slice of the board named BOARD
 *   set UUID KEY VALUE             capability (90 is 9.0, the default), used, util, power (mW), energy (mJ), temp, throttle (bits), events (bits),
 *                                  mig (1: the mode is on, even without slices), metered (percent: energy rises with
 *                                  time by so much of the power)
 *   memory UUID V1 V2 ...          used bytes by number of looks; the last one stays
 *   process UUID PID BYTES         one that computes; of `graphics UUID PID BYTES`, that draws
 *   holder UUID PID BYTES          one that computes and uses these bytes for as long as it is there
 *   event SERIAL UUID TYPE DATA    delivered once, in order of SERIAL (above 0, rising)
 *   fail CALL UUID CODE            CALL as below; UUID * is any
 *   hang CALL UUID                 does not return while the line is there
 *   without CALL                   as `fail CALL * 3` (not supported)
 *
 * Calls that would change a device change nothing here: their names are added to the file FLOWMESH_NVML_STUB.changes.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, TIMEOUT = 10, MISMATCH = 25 };
enum { MAX_DEVICES = 64, LINE = 512 };

typedef struct { char uuid[96]; int seen; unsigned looks; } device;
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } process;
typedef struct { device *device; unsigned long long type, data; unsigned gi, ci; } event;

static device devices[MAX_DEVICES];
static int initialised, forgotten;
static unsigned long long delivered;
static device event_set;

typedef int (*visitor)(char **words, int count, void *state);

/* Calls visit for every line whose first word is `verb`; stops and returns what visit returns when it is not 0. */
static int each(const char *verb, visitor visit, void *state)
{
    const char *path = getenv("FLOWMESH_NVML_STUB");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[LINE], *words[40];
    int result = 0;
    if (!file) return 0;
    while (!result && fgets(line, sizeof line, file)) {
        int count = 0;
        char *rest = NULL;
        for (char *word = strtok_r(line, " \t\n", &rest); word && count < 40; word = strtok_r(NULL, " \t\n", &rest))
            words[count++] = word;
        if (count && !strcmp(words[0], verb)) result = visit(words, count, state);
    }
    fclose(file);
    return result;
}

static int first_word(char **words, int count, void *state)
{
    if (count < 2) return 0;
    snprintf(state, 96, "%s", words[1]);
    return 1;
}

typedef struct { const char *call, *uuid; int code; } rule;

static int matches(char **words, const rule *wanted)
{
    return !strcmp(words[1], wanted->call) && (!strcmp(words[2], "*") || !strcmp(words[2], wanted->uuid));
}

static int find_fail(char **words, int count, void *state)
{
    rule *wanted = state;
    if (count < 4 || !matches(words, wanted)) return 0;
    wanted->code = atoi(words[3]);
    return 1;
}

static int find_hang(char **words, int count, void *state) { return count >= 3 && matches(words, state); }

static int find_without(char **words, int count, void *state)
{
    return count >= 2 && !strcmp(words[1], ((rule *)state)->call);
}

/* What every call starts with: initialised? told to hang, to fail, or to be missing? */
static int enter(const char *call, const char *uuid)
{
    rule wanted = {call, uuid ? uuid : "*", OK};
    char epoch[96] = "0";
    each("forget", first_word, epoch);
    if (atoi(epoch) != forgotten) { forgotten = atoi(epoch); initialised = 0; }
    if (!initialised) return UNINITIALIZED;
    while (each("hang", find_hang, &wanted)) usleep(5000);
    if (each("fail", find_fail, &wanted)) return wanted.code;
    return each("without", find_without, &wanted) ? NOT_SUPPORTED : OK;
}

/* ---- devices ---------------------------------------------------------------------------------------------------- */

static device *intern(const char *uuid)
{
    for (int i = 0; i < MAX_DEVICES; i++) {
        if (!devices[i].seen) { devices[i].seen = 1; snprintf(devices[i].uuid, sizeof devices[i].uuid, "%s", uuid); }
        if (!strcmp(devices[i].uuid, uuid)) return &devices[i];
    }
    abort();
}

typedef struct { const char *board; int wanted, at; char uuid[96]; } place;

static int nth_gpu(char **words, int count, void *state)
{
    place *p = state;
    if (count < 3 || p->at++ != p->wanted) return 0;
    snprintf(p->uuid, sizeof p->uuid, "%s", words[1]);
    return 1;
}

static int nth_mig(char **words, int count, void *state)
{
    place *p = state;
    if (count < 6 || strcmp(words[1], p->board) || p->at++ != p->wanted) return 0;
    snprintf(p->uuid, sizeof p->uuid, "%s", words[2]);
    return 1;
}

typedef struct { const char *uuid; char board[96], name[96]; unsigned long long total; unsigned gi, ci; int mig; } about;

static int about_gpu(char **words, int count, void *state)
{
    about *a = state;
    if (count < 3 || strcmp(words[1], a->uuid)) return 0;
    a->total = strtoull(words[2], NULL, 10);
    a->name[0] = 0;
    for (int i = 3; i < count; i++)
        snprintf(a->name + strlen(a->name), sizeof a->name - strlen(a->name), "%s%s", i > 3 ? " " : "", words[i]);
    return 1;
}

static int about_mig(char **words, int count, void *state)
{
    about *a = state;
    if (count < 6 || strcmp(words[2], a->uuid)) return 0;
    a->mig = 1;
    a->total = strtoull(words[3], NULL, 10);
    a->gi = atoi(words[4]);
    a->ci = atoi(words[5]);
    snprintf(a->board, sizeof a->board, "%s", words[1]);
    snprintf(a->name, sizeof a->name, "Stub MIG %ug", a->gi);
    return 1;
}

static about look_up(const device *d)
{
    about a = {.uuid = d->uuid};
    if (!each("gpu", about_gpu, &a)) each("mig", about_mig, &a);
    return a;
}

typedef struct { const char *uuid, *key; unsigned long long value; } setting;

static int find_setting(char **words, int count, void *state)
{
    setting *s = state;
    if (count < 4 || strcmp(words[1], s->uuid) || strcmp(words[2], s->key)) return 0;
    s->value = strtoull(words[3], NULL, 0);
    return 1;
}

static unsigned long long value_of(const device *d, const char *key)
{
    setting s = {d->uuid, key, 0};
    each("set", find_setting, &s);
    return s.value;
}

typedef struct { device *device; unsigned long long used; } series;

static int find_memory(char **words, int count, void *state)
{
    series *s = state;
    if (count < 3 || strcmp(words[1], s->device->uuid)) return 0;
    unsigned at = 2 + s->device->looks++;
    s->used = strtoull(words[at < (unsigned)count ? at : (unsigned)count - 1], NULL, 10);
    return 1;
}

/* Whether a process exists and is no zombie: the driver frees what a process had as soon as that ends. */
static bool is_there(const char *pid)
{
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%.20s/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file) return false;
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = 0;
    const char *name_end = strrchr(text, ')');
    return name_end && name_end[1] && name_end[2] != 'Z' && name_end[2] != 'X';
}

typedef struct { const char *uuid; unsigned long long bytes; } holding;

static int add_holder(char **words, int count, void *state)
{
    holding *h = state;
    if (count >= 4 && !strcmp(words[1], h->uuid) && is_there(words[2])) h->bytes += strtoull(words[3], NULL, 10);
    return 0;
}

static unsigned long long used_bytes(device *d)
{
    series s = {d, 0};
    holding h = {d->uuid, 0};
    each("holder", add_holder, &h);
    return h.bytes + (each("memory", find_memory, &s) ? s.used : value_of(d, "used"));
}

/* ---- the library ------------------------------------------------------------------------------------------------ */

int nvmlInitWithFlags(unsigned flags)
{
    char code[96] = "0";
    rule wanted = {"init", "*", OK};
    (void)flags;
    while (each("hang", find_hang, &wanted)) usleep(5000);
    each("init", first_word, code);
    if (!atoi(code)) {
        char epoch[96] = "0";
        each("forget", first_word, epoch);
        forgotten = atoi(epoch);
        initialised = 1;
    }
    return atoi(code);
}

int nvmlShutdown(void)
{
    int was = initialised;
    initialised = 0;
    return was ? OK : UNINITIALIZED;
}

const char *nvmlErrorString(int code) { return code == OK ? "Success" : "Stub error"; }

int nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    char text[96] = "1.0";
    int code = enter("driver", NULL);
    each("driver", first_word, text);
    snprintf(version, length, "%s", text);
    return code;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    char text[96] = "12080";
    int code = enter("cuda", NULL);
    each("cuda", first_word, text);
    *version = atoi(text);
    return code;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    place p = {.wanted = -1};
    int code = enter("count", NULL);
    each("gpu", nth_gpu, &p);
    *count = p.at;
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **handle)
{
    place p = {.wanted = (int)index};
    int code;
    if (!each("gpu", nth_gpu, &p)) return NOT_FOUND;
    code = enter("handle", p.uuid);
    *handle = intern(p.uuid);
    return code;
}

int nvmlDeviceGetUUID(device *d, char *uuid, unsigned length)
{
    int code = enter("uuid", d->uuid);
    snprintf(uuid, length, "%s", d->uuid);
    return code;
}

int nvmlDeviceGetName(device *d, char *name, unsigned length)
{
    int code = enter("name", d->uuid);
    snprintf(name, length, "%s", look_up(d).name);
    return code;
}

int nvmlDeviceGetCudaComputeCapability(device *d, int *major, int *minor)
{
    int code = enter("capability", d->uuid);
    int value = (int)value_of(d, "capability");
    *major = value ? value / 10 : 9;
    *minor = value % 10;
    return code;
}

int nvmlDeviceGetMemoryInfo(device *d, memory_v1 *memory)
{
    int code = enter("memory_v1", d->uuid);
    memory->total = look_up(d).total;
    memory->used = code ? 0 : used_bytes(d) + value_of(d, "reserved");
    memory->free = memory->total - memory->used;
    return code;
}

int nvmlDeviceGetMemoryInfo_v2(device *d, memory_v2 *memory)
{
    int code = enter("memory", d->uuid);
    if (memory->version != (sizeof *memory | 2u << 24)) return MISMATCH;
    memory->total = look_up(d).total;
    memory->reserved = value_of(d, "reserved");
    memory->used = code ? 0 : used_bytes(d);
    memory->free = memory->total - memory->used - memory->reserved;
    return code;
}

int nvmlDeviceGetUtilizationRates(device *d, utilization *rates)
{
    int code = enter("utilization", d->uuid);
    rates->gpu = (unsigned)value_of(d, "util");
    rates->memory = 0;
    return code ? code : look_up(d).mig ? NOT_SUPPORTED : OK;
}

static int number(device *d, const char *key, unsigned *value)
{
    int code = enter(key, d->uuid);
    *value = (unsigned)value_of(d, key);
    return code ? code : look_up(d).mig ? NOT_SUPPORTED : OK;
}

int nvmlDeviceGetPowerUsage(device *d, unsigned *milliwatts) { return number(d, "power", milliwatts); }

int nvmlDeviceGetTemperature(device *d, unsigned sensor, unsigned *celsius)
{
    (void)sensor;
    return number(d, "temp", celsius);
}

int nvmlDeviceGetTotalEnergyConsumption(device *d, unsigned long long *millijoules)
{
    int code = enter("energy", d->uuid);
    *millijoules = value_of(d, "energy");
    unsigned long long percent = value_of(d, "metered");
    if (percent) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        double seconds = (double)now.tv_sec + (double)now.tv_nsec / 1e9;
        *millijoules += (unsigned long long)(seconds * (double)value_of(d, "power") * (double)percent / 100);
    }
    return code ? code : look_up(d).mig ? NOT_SUPPORTED : OK;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(device *d, unsigned long long *reasons)
{
    int code = enter("throttle", d->uuid);
    *reasons = value_of(d, "throttle");
    return code;
}

typedef struct { const char *uuid; unsigned count, room; process *into; } listing;

static int list_process(char **words, int count, void *state)
{
    listing *l = state;
    if (count < 4 || strcmp(words[1], l->uuid)) return 0;
    if (l->into && l->count < l->room)
        l->into[l->count] = (process){(unsigned)atoi(words[2]), strtoull(words[3], NULL, 10), ~0u, ~0u};
    l->count++;
    return 0;
}

static int list_holder(char **words, int count, void *state)
{
    return count >= 4 && is_there(words[2]) ? list_process(words, count, state) : 0;
}

static int list_all(const char *call, const char *verb, device *d, unsigned *count, process *into)
{
    listing l = {d->uuid, 0, *count, into};
    int code = enter(call, d->uuid);
    if (code) return code;
    each(verb, list_process, &l);
    if (!strcmp(verb, "process")) each("holder", list_holder, &l);
    *count = l.count;
    return l.count > l.room || (l.count && !into) ? INSUFFICIENT_SIZE : OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device *d, unsigned *count, process *into)
{
    return list_all("processes", "process", d, count, into);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(device *d, unsigned *count, process *into)
{
    return list_all("graphics", "graphics", d, count, into);
}

/* ---- MIG -------------------------------------------------------------------------------------------------------- */

static unsigned slices(const device *d)
{
    place p = {.board = d->uuid, .wanted = -1};
    each("mig", nth_mig, &p);
    return p.at;
}

int nvmlDeviceGetMigMode(device *d, unsigned *current, unsigned *pending)
{
    int code = enter("mig", d->uuid);
    *current = *pending = value_of(d, "mig") || slices(d) > 0;
    return code;
}

int nvmlDeviceGetMaxMigDeviceCount(device *d, unsigned *count)
{
    int code = enter("mig_count", d->uuid);
    *count = 7;
    return code;
}

int nvmlDeviceGetMigDeviceHandleByIndex(device *d, unsigned index, device **handle)
{
    place p = {.board = d->uuid, .wanted = (int)index};
    int code = enter("mig_handle", d->uuid);
    if (code) return code;
    if (!each("mig", nth_mig, &p)) return NOT_FOUND;
    *handle = intern(p.uuid);
    return OK;
}

int nvmlDeviceGetGpuInstanceId(device *d, unsigned *id)
{
    *id = look_up(d).gi;
    return enter("gi", d->uuid);
}

int nvmlDeviceGetComputeInstanceId(device *d, unsigned *id)
{
    *id = look_up(d).ci;
    return enter("ci", d->uuid);
}

/* ---- events ----------------------------------------------------------------------------------------------------- */

static unsigned long long listening[MAX_DEVICES];

int nvmlEventSetCreate(device **set)
{
    memset(listening, 0, sizeof listening);
    *set = &event_set;
    return enter("event_set", NULL);
}

int nvmlEventSetFree(device *set)
{
    (void)set;
    return enter("event_free", NULL);
}

int nvmlDeviceGetSupportedEventTypes(device *d, unsigned long long *types)
{
    int code = enter("event_types", d->uuid);
    *types = value_of(d, "events");
    if (!*types) *types = 8 | 2;
    return code;
}

int nvmlDeviceRegisterEvents(device *d, unsigned long long types, device *set)
{
    int code = enter("register", d->uuid);
    (void)set;
    if (!code) listening[d - devices] |= types;
    return code;
}

static int next_event(char **words, int count, void *state)
{
    event *found = state;
    if (count < 5 || strtoull(words[1], NULL, 10) <= delivered) return 0;
    device *d = intern(words[2]);
    unsigned long long type = strtoull(words[3], NULL, 0);
    if (!(listening[d - devices] & type)) return 0;
    delivered = strtoull(words[1], NULL, 10);
    *found = (event){d, type, strtoull(words[4], NULL, 10), count > 5 ? (unsigned)atoi(words[5]) : ~0u, ~0u};
    return 1;
}

int nvmlEventSetWait_v2(device *set, event *found, unsigned timeout_ms)
{
    int code = enter("events", NULL);
    (void)set;
    if (code) return code;
    if (each("event", next_event, found)) return OK;
    usleep(timeout_ms * 1000);
    return TIMEOUT;
}

/* ---- calls that would change a device ---------------------------------------------------------------------------- */

static int changed(const char *call)
{
    char path[512];
    const char *script = getenv("FLOWMESH_NVML_STUB");
    snprintf(path, sizeof path, "%s.changes", script ? script : "/dev/null");
    FILE *file = fopen(path, "a");
    if (file) { fprintf(file, "%s\n", call); fclose(file); }
    return OK;
}

#define CHANGES(call) int call(void); int call(void) { return changed(#call); }
CHANGES(nvmlDeviceSetPersistenceMode)
CHANGES(nvmlDeviceSetComputeMode)
CHANGES(nvmlDeviceSetPowerManagementLimit)
CHANGES(nvmlDeviceSetPowerManagementLimit_v2)
CHANGES(nvmlDeviceSetApplicationsClocks)
CHANGES(nvmlDeviceResetApplicationsClocks)
CHANGES(nvmlDeviceSetGpuLockedClocks)
CHANGES(nvmlDeviceResetGpuLockedClocks)
CHANGES(nvmlDeviceSetMemoryLockedClocks)
CHANGES(nvmlDeviceResetMemoryLockedClocks)
CHANGES(nvmlDeviceSetClockOffsets)
CHANGES(nvmlDeviceSetFanSpeed_v2)
CHANGES(nvmlDeviceSetMigMode)
CHANGES(nvmlDeviceCreateGpuInstance)
CHANGES(nvmlGpuInstanceDestroy)
CHANGES(nvmlDeviceSetEccMode)
CHANGES(nvmlDeviceClearEccErrorCounts)
CHANGES(nvmlDeviceSetAccountingMode)
CHANGES(nvmlDeviceSetAPIRestriction)
CHANGES(nvmlDeviceSetTemperatureThreshold)
