"""The queue's steps as Redis scripts: each is atomic, so a task is in one place at any time, and ends once.

A task's record (a hash) has its state and the number of its attempt. An attempt's report counts only while the record
has that number: that is the fence against a node that comes back with a task which another one has taken over.

    queued ----- CLAIM ------> claimed ----- REPORT started ----> running
      ^                          |                                  |
      '--- RELEASE, REPORT (retryable, drained), TAKE_BACK --------'
    queued | claimed | running ----- REPORT end, CANCEL, TAKE_BACK ----> done: the one event on tasks.events

Costs: a claim reads the numbers of waiting entries once, and one stream; nothing depends on how many tasks wait or on
how many workers there are.
"""

from __future__ import annotations

from flowmesh.queue.lua import Script

QUEUE = Script.of("""
-- id, at, class member, class key, priority, owner, retries, document, type, name, time limit in seconds or '',
-- nodes at least, nodes at most; of a pipeline's stage: the pipeline, its driver's number, the run, what the task runs
local id, at, member, ck = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local pipeline, is_gang = ARGV[14], ARGV[13] ~= '1'
if pipeline then
  local f = get(pipeline, 'attempt', 'state', 'cancel')
  if f[1] ~= ARGV[15] or f[2] ~= 'running' then return 'lost' end
  if redis.call('HGET', record(id), 'run') == ARGV[16] then return 'same' end
  if f[3] then return 'cancelled' end
end
local state = redis.call('HGET', record(id), 'state')
if state and state ~= 'done' then return 'exists' end
local attempt = redis.call('HGET', record(id), 'attempt') or '0'
redis.call('DEL', record(id), P .. 'attempts:' .. id, P .. 'result:' .. id)
redis.call('ZREM', P .. 'tasks:done', id)
redis.call('HSET', record(id), 'queued_at', at, 'class', is_gang and '' or ck, 'class_json', member,
  'priority', ARGV[5], 'owner', ARGV[6], 'retries', ARGV[7], 'message', ARGV[8], 'type', ARGV[9], 'name', ARGV[10],
  'attempt', attempt, 'failures', '0', 'timeout', ARGV[11])
if pipeline then
  redis.call('HSET', record(id), 'pipeline', pipeline, 'run', ARGV[16])
  redis.call('HSET', P .. 'pipeline:' .. pipeline .. ':tasks', id, ARGV[17])
end
if is_gang then
  redis.call('HSET', record(id), 'state', 'queued', 'least', ARGV[12], 'most', ARGV[13])
  redis.call('ZADD', P .. 'queue:gangs', gang_place(ARGV[5], now_ms()), id)
  redis.call('ZADD', P .. 'tasks:open', now_ms(), id)
  redis.call('PUBLISH', 'flowmesh.queue', '{"type":"CLASS"}')
  return 'queued'
end
local known = redis.call('ZSCORE', P .. 'queue:classes', member)
add(id, false)
redis.call('ZADD', P .. 'tasks:open', now_ms(), id)
if not known then
  redis.call('PUBLISH', 'flowmesh.queue', '{"type":"CLASS"}')
  local old = now_ms() - 86400000
  for _, each in ipairs(redis.call('ZRANGEBYSCORE', P .. 'queue:classes', '-inf', old, 'LIMIT', 0, 100)) do
    local key = string.sub(redis.sha1hex(each), 1, 16)
    if waiting(key) == 0 then
      redis.call('ZREM', P .. 'queue:classes', each)
      redis.call('DEL', P .. 'queue:c:' .. key .. ':wake')
    end
  end
end
if ARGV[5] == 'high' then redis.call('PUBLISH', 'flowmesh.queue', '{"type":"URGENT"}') end
return 'queued'
""")
"""Add a task; one on several nodes waits apart, see gang_scripts. Returns `queued`, or `exists`: it has not ended.

Of a stage also `lost` (another driver has the pipeline), `same` (this run's task was queued before, perhaps by an
earlier driver), or `cancelled` (the pipeline is).
"""

DISPATCHED = Script.of("""
-- id, at, worker, document's type, owner, name
local id = ARGV[1]
local state = redis.call('HGET', record(id), 'state')
if state and state ~= 'done' then return 0 end
local attempt = (tonumber(redis.call('HGET', record(id), 'attempt')) or 0) + 1
redis.call('DEL', record(id), P .. 'attempts:' .. id, P .. 'result:' .. id)
redis.call('ZREM', P .. 'tasks:done', id)
redis.call('HSET', record(id), 'state', 'dispatched', 'queued_at', ARGV[2], 'worker_id', ARGV[3], 'type', ARGV[4],
  'owner', ARGV[5], 'name', ARGV[6], 'attempt', attempt, 'failures', '0', 'retries', '0')
redis.call('EXPIRE', record(id), 7 * 86400)
redis.call('ZADD', P .. 'tasks:open', now_ms(), id)
return attempt
""")
"""Record a task that is about to be dispatched to a worker. Returns its attempt; 0: a task of this id has not ended."""

CLAIM = Script.of("""
-- worker, node, at, class that woke us or '', seconds that are left or '', those that a task without a limit needs,
-- class keys in the order of preference
local worker, node, at, woken = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local function refused(why)
  if woken ~= '' and waiting(woken) > 0 then wake(woken) end
  return {why}
end
if redis.call('EXISTS', 'worker:' .. worker .. ':hb') == 0 then return refused('unregistered') end
if redis.call('SISMEMBER', 'workers:elastic_disabled', worker) == 1 then return refused('disabled') end
if redis.call('HEXISTS', P .. 'queue:offer:' .. worker, 'gang') == 1 then return refused('member') end
redis.call('DEL', P .. 'queue:offer:' .. worker)
local fields = {}
local priorities = {'high', 'normal', 'low'}
for _, priority in ipairs(priorities) do
  for i = 7, #ARGV do fields[#fields + 1] = ARGV[i] .. ':' .. priority end
end
if #fields == 0 then return {'none', {}, 0} end
local counts = redis.call('HMGET', WAITING, unpack(fields))
local skipped, now = {}, now_ms()
local left, long = tonumber(ARGV[5]), 0
local function can_finish(id)
  local f = get(id, 'timeout', 'message', 'state')
  local limit = tonumber(f[1] or '')
  if not f[1] and f[2] and #f[2] <= 65536 then
    local ok, document = pcall(cjson.decode, f[2])
    local spec = ok and type(document) == 'table' and document.spec
    limit = type(spec) == 'table' and tonumber(spec.timeoutSec) or nil
  end
  return f[3] ~= 'queued' or (limit or tonumber(ARGV[6])) <= left
end
local function take(key, entry, id, ck, priority)
  local f = get(id, 'state', 'entry', 'attempt', 'avoid', 'avoid_until', 'stay', 'stay_until', 'message', 'failures')
  if f[1] ~= 'queued' or f[2] ~= entry then
    drop_entry(key, entry)
    return nil
  end
  local avoided = f[4] == node and (tonumber(f[5]) or 0) > now
  local reserved = f[6] and f[6] ~= node and (tonumber(f[7]) or 0) > now
  if avoided or reserved then
    drop_entry(key, entry)
    count(ck, priority, -1)
    add(id, true)
    skipped[#skipped + 1] = id
    return nil
  end
  local attempt = tonumber(f[3]) + 1
  count(ck, priority, -1)
  redis.call('HSET', record(id), 'state', 'claimed', 'attempt', attempt, 'worker_id', worker, 'node_id', node,
    'claimed_at', at)
  redis.call('HDEL', record(id), 'avoid', 'avoid_until', 'stay', 'stay_until')
  redis.call('HSET', P .. 'queue:held:' .. worker, id, attempt)
  redis.call('SADD', P .. 'queue:holders', worker)
  if priority == 'high' and redis.call('EXISTS', P .. 'queue:preempt:' .. ck) == 1 then
    redis.call('DECR', P .. 'queue:preempt:' .. ck)
  end
  if waiting(ck) > 0 then wake(ck) else redis.call('DEL', P .. 'queue:c:' .. ck .. ':wake') end
  if woken ~= '' and woken ~= ck and waiting(woken) > 0 then wake(woken) end
  return {'task', id, attempt, priority, f[8], ck}
end
local function next_that_can_finish(key)
  local seen = last_read(key)
  -- from `seen` itself: Redis before 6.2 knows no ranges without their first entry
  for _, e in ipairs(redis.call('XRANGE', key, seen, '+', 'COUNT', 33)) do
    if e[1] ~= seen then
      if can_finish(e[2][2]) then
        redis.call('XCLAIM', key, 'flowmesh', worker, 0, e[1], 'FORCE', 'JUSTID')
        return e[1], e[2][2]
      end
      long = long + 1
    end
  end
end
local function next_of(key)
  if redis.call('EXISTS', key) == 0 then return nil end
  if left then return next_that_can_finish(key) end
  local r = redis.call('XREADGROUP', 'GROUP', 'flowmesh', worker, 'COUNT', 1, 'STREAMS', key, '>')
  if not r then return nil end
  local e = r[1][2][1]
  return e[1], e[2][2]
end
for index, n in ipairs(counts) do
  if n then
    local ck = ARGV[7 + (index - 1) % (#ARGV - 6)]
    local priority = priorities[1 + math.floor((index - 1) / (#ARGV - 6))]
    local b = base(ck, priority)
    local front = b .. ':front'
    for _ = 1, math.min(8, redis.call('XLEN', front)) do
      local entry, id = next_of(front)
      if not entry then break end
      local got = take(front, entry, id, ck, priority)
      if got then return got end
    end
    local passed = 0
    while passed < 32 do
      local owner = redis.call('ZRANGE', b .. ':ring', passed, passed)[1]
      if not owner then break end
      local key = b .. ':o:' .. owner
      local before = long
      local entry, id = next_of(key)
      if entry then
        redis.call('ZADD', b .. ':ring', redis.call('INCR', P .. 'queue:turn'), owner)
        local got = take(key, entry, id, ck, priority)
        if got then return got end
      elseif long > before then
        passed = passed + 1
      else
        redis.call('ZREM', b .. ':ring', owner)
        if redis.call('EXISTS', key) == 1 and redis.call('XLEN', key) == 0 then redis.call('DEL', key) end
      end
    end
  end
end
for i = 7, #ARGV do
  if waiting(ARGV[i]) == 0 then
    redis.call('DEL', P .. 'queue:c:' .. ARGV[i] .. ':wake')
  elseif ARGV[i] == woken then
    wake(woken)
  end
end
return {'none', skipped, long}
""")
"""Take the next entry of the given classes: by priority; what came back first; in turn between owners; by age.

A node with an end takes what it can finish, of the first 32 entries of each stream; the others keep their places.

Returns `[task, id, attempt, priority, document, class]`; `[none, tasks that another node should have, how many take
longer than the node is there]`; `[unregistered]`; `[disabled]`; `[member]`: a gang has the worker. The entry stays
pending in its stream until JOURNALLED.
"""

ALLOW = Script.of("""
-- id, node
if redis.call('HGET', record(ARGV[1]), 'avoid') ~= ARGV[2] then return 0 end
redis.call('HDEL', record(ARGV[1]), 'avoid', 'avoid_until')
return 1
""")
"""Let a node take a task again that failed there: it fits no other one any more."""

PEEK = Script.of("""
-- node, task that is known, class keys in the order of preference
local node, known, now = ARGV[1], ARGV[2], now_ms()
local function next_of(key)
  if redis.call('EXISTS', key) == 0 then return nil end
  local seen = last_read(key)
  for _, e in ipairs(redis.call('XRANGE', key, seen, '+', 'COUNT', 9)) do
    local id = e[2][2]
    local f = get(id, 'state', 'entry', 'avoid', 'avoid_until', 'stay', 'stay_until')
    local avoided = f[3] == node and (tonumber(f[4]) or 0) > now
    local reserved = f[5] and f[5] ~= node and (tonumber(f[6]) or 0) > now
    if e[1] ~= seen and f[1] == 'queued' and f[2] == e[1] and not avoided and not reserved then return id end
  end
end
local function found(id)
  if id == known then return {id, ''} end
  return {id, redis.call('HGET', record(id), 'message')}
end
for _, priority in ipairs({'high', 'normal', 'low'}) do
  for i = 3, #ARGV do
    local b = base(ARGV[i], priority)
    local id = next_of(b .. ':front')
    if id then return found(id) end
    for _, owner in ipairs(redis.call('ZRANGE', b .. ':ring', 0, 7)) do
      id = next_of(b .. ':o:' .. owner)
      if id then return found(id) end
    end
  end
end
return {}
""")
"""The task that a claim would get, without taking it: nothing is written. Returns its id and its document, or nothing;
an empty document where it is the one that is known."""

JOURNALLED = Script.of("""
-- id, attempt
local f = get(ARGV[1], 'attempt', 'state')
if f[1] ~= ARGV[2] or (f[2] ~= 'claimed' and f[2] ~= 'running') then return 0 end
forget_entry(ARGV[1])
return 1
""")
"""Acknowledge a claim: its task is in a node's journal. Returns 0 if the attempt is not the current one any more."""

RELEASE = Script.of("""
-- id, attempt, worker, at, evidence
local id, attempt, worker = ARGV[1], ARGV[2], ARGV[3]
let_go(worker, id, attempt)
local f = get(id, 'attempt', 'state', 'cancel')
if f[1] ~= attempt or (f[2] ~= 'claimed' and f[2] ~= 'running') then return 0 end
forget_entry(id)
if ARGV[5] ~= '' then evidence(id, ARGV[5]) end
if f[3] then
  finish(id, 86400, ARGV[4], failed_event(id, worker, ARGV[4], 'cancelled', f[3]), '0', 'cancelled', f[3])
  return 1
end
add(id, true)
return 1
""")
"""Give a claim back, to the front of its class: it did not run here. Not counted as a failure."""

REPORT = Script.of("""
-- id, attempt, worker, node, started|end, event, at; of an end: ok, verdict, retryable, error, evidence, result, ttl of
-- the result, milliseconds to avoid this node, milliseconds to keep it for this node
local id, attempt, worker, node, what, event, at = unpack(ARGV, 1, 7)
local f = get(id, 'state', 'attempt', 'retries', 'failures', 'cancel', 'reported', 'class')
local state = f[1]
if state and (f[2] ~= attempt or (state ~= 'claimed' and state ~= 'running' and state ~= 'dispatched')) then
  if what == 'end' then
    let_go(worker, id, attempt)
    if f[6] ~= attempt then evidence(id, ARGV[12]) end
    if state == 'done' then redis.call('EXPIRE', P .. 'attempts:' .. id, 86400) end
  end
  return f[6] == attempt and 'again' or 'stale'
end
if what == 'started' then
  if state then
    redis.call('HSET', record(id), 'state', 'running', 'started_at', at, 'worker_id', worker, 'node_id', node)
  end
  redis.call('PUBLISH', 'tasks.events', event)
  return 'published'
end
let_go(worker, id, attempt)
redis.call('HSET', record(id), 'reported', attempt, 'attempt', attempt, 'worker_id', worker)
evidence(id, ARGV[12])
local ok, verdict, retryable = ARGV[8], ARGV[9], ARGV[10]
if ok ~= '1' and f[7] and not f[5] then
  local failures = tonumber(f[4]) or 0
  local counted = verdict ~= 'drained'
  if not counted or (retryable == '1' and failures < (tonumber(f[3]) or 0)) then
    forget_entry(id)
    if counted then redis.call('HSET', record(id), 'failures', failures + 1) end
    local now = now_ms()
    if ARGV[15] ~= '0' then redis.call('HSET', record(id), 'avoid', node, 'avoid_until', now + ARGV[15]) end
    if ARGV[16] ~= '0' then redis.call('HSET', record(id), 'stay', node, 'stay_until', now + ARGV[16]) end
    redis.call('HDEL', record(id), 'started_at', 'claimed_at')
    add(id, true)
    redis.call('PUBLISH', 'flowmesh.queue', cjson.encode({type = 'ATTEMPT_FAILED', ts = at, task_id = id,
      worker_id = worker, attempt = tonumber(attempt), error_kind = verdict, error = ARGV[11]}))
    return 'requeued'
  end
end
if ARGV[13] ~= '' and ARGV[14] ~= '0' then
  redis.call('SET', P .. 'result:' .. id, ARGV[13], 'EX', ARGV[14])
end
finish(id, 86400, at, event, ok, verdict, ARGV[11])
return 'published'
""")
"""Report an attempt's start or end.

Returns `published` (the event went out), `requeued` (another attempt follows), `stale` (another attempt has the task,
or it has ended: nothing was published), or `again` (this report came before).
"""

TAKE_BACK = Script.of("""
-- worker, how long it must have been gone in milliseconds, at
local worker, at = ARGV[1], ARGV[3]
local held = P .. 'queue:held:' .. worker
if redis.call('EXISTS', 'worker:' .. worker .. ':hb') == 1 then
  redis.call('HDEL', P .. 'queue:gone', worker)
  return 0
end
local since = tonumber(redis.call('HGET', P .. 'queue:gone', worker))
if not since then
  redis.call('HSET', P .. 'queue:gone', worker, now_ms())
  if tonumber(ARGV[2]) > 0 then return 0 end
elseif now_ms() - since < tonumber(ARGV[2]) then
  return 0
end
local all, n = redis.call('HGETALL', held), 0
for i = 1, math.min(#all, 200), 2 do
  local id, attempt = all[i], all[i + 1]
  redis.call('HDEL', held, id)
  local f = get(id, 'state', 'attempt', 'retries', 'failures', 'cancel')
  if f[2] == attempt and (f[1] == 'claimed' or f[1] == 'running') then
    local error = 'the node of worker ' .. worker .. ' is gone: its heartbeat ended'
    evidence(id, cjson.encode({attempt = tonumber(attempt), worker_id = worker, ended_at = at,
      error_kind = 'supervisor_lost', error = error}))
    local failures = tonumber(f[4]) or 0
    forget_entry(id)
    if f[5] then
      finish(id, 86400, at, failed_event(id, worker, at, 'cancelled', f[5]), '0', 'cancelled', f[5])
    elseif failures >= (tonumber(f[3]) or 0) then
      finish(id, 86400, at, failed_event(id, worker, at, 'supervisor_lost', error), '0', 'supervisor_lost', error)
    else
      redis.call('HSET', record(id), 'failures', failures + 1)
      redis.call('HDEL', record(id), 'started_at', 'claimed_at')
      add(id, true)
    end
    n = n + 1
  end
end
if redis.call('EXISTS', held) == 0 then
  redis.call('SREM', P .. 'queue:holders', worker)
  redis.call('HDEL', P .. 'queue:gone', worker)
end
return n
""")
"""Return what a worker without heartbeat holds to the queue, counted as a failure. Returns how many tasks came back."""

CANCEL = Script.of("""
-- id, at, reason, '1': by force
local id, at, reason = ARGV[1], ARGV[2], ARGV[3]
local f = get(id, 'state', 'type')
if not f[1] then return 'unknown' end
if f[1] == 'done' then return 'done' end
if f[1] ~= 'queued' then
  redis.call('HSET', record(id), 'cancel', reason)
  if f[2] == 'pipeline' and ARGV[4] == '1' then redis.call('HSET', record(id), 'force', '1') end
  return f[1]
end
end_waiting(id, at, reason)
return 'queued'
""")
"""Cancel a task: one that waits ends here; for any other, no attempt follows. Returns the state that it was in."""

PREEMPT = Script.of("""
-- class key
local urgent = tonumber(redis.call('HGET', WAITING, ARGV[1] .. ':high')) or 0
local key = P .. 'queue:preempt:' .. ARGV[1]
if urgent <= (tonumber(redis.call('GET', key)) or 0) then return 0 end
redis.call('INCR', key)
redis.call('EXPIRE', key, 60)
return 1
""")
"""Ask to stop one low task for an urgent entry of a class. Returns 1 for as many as urgent entries wait."""

WAKE = Script.of("""
-- class key
if waiting(ARGV[1]) > 0 then wake(ARGV[1]) end
return 1
""")
"""Give back a token that no slot could use."""
