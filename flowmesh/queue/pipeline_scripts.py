"""The steps of a submitted pipeline as Redis scripts. A node's driver process holds a pipeline by a lease.

    queued ---- DRIVE ----> running ---- END, CANCEL (of one that no driver has had) ----> done: the one event
                  ^            |
                  '-- LET_GO, or the lease has ended: the next driver goes on with what is missing

The record is a task's, of the type `pipeline`, so that clients treat it as a task. Its `attempt` counts the drivers and
is the fence: a driver that hung, and comes back after another one has taken over, can queue, keep and end nothing.
"""

from __future__ import annotations

from flowmesh.queue.lua import Script

TYPE = "pipeline"
LEASE_MS = 15_000
"""How long a driver that does not answer keeps its pipeline."""
MOST_FAILURES = 20
"""Drivers in a row that may die before a stage ends; the next one only cancels what runs, and ends the pipeline."""

_FENCE = """
local function mine(id, attempt)
  local f = get(id, 'attempt', 'state', 'type')
  return f[1] == attempt and f[2] == 'running' and f[3] == 'pipeline'
end
local function part(id, name) return P .. 'pipeline:' .. id .. ':' .. name end
"""


def _script(body: str) -> Script:
    return Script.of(_FENCE + body)


SUBMIT = _script("""
-- id, at, priority, owner, retries, document, name, generation, '1': queue stages that fit no worker
local id = ARGV[1]
local state, attempt = unpack(get(id, 'state', 'attempt'))
if state and state ~= 'done' then return 'exists' end
redis.call('DEL', record(id), P .. 'attempts:' .. id, P .. 'result:' .. id, part(id, 'stages'), part(id, 'log'),
  part(id, 'tasks'))
redis.call('PERSIST', part(id, 'ends'))
redis.call('ZREM', P .. 'tasks:done', id)
redis.call('HSET', record(id), 'state', 'queued', 'queued_at', ARGV[2], 'type', 'pipeline', 'class', '',
  'priority', ARGV[3], 'owner', ARGV[4], 'retries', ARGV[5], 'message', ARGV[6], 'name', ARGV[7],
  'generation', ARGV[8], 'anyway', ARGV[9], 'attempt', attempt or '0', 'failures', '0')
redis.call('ZADD', P .. 'tasks:open', now_ms(), id)
redis.call('ZADD', P .. 'pipelines', now_ms(), id)
redis.call('PUBLISH', 'flowmesh.queue', '{"type":"PIPELINE"}')
return 'queued'
""")
"""Add a pipeline. Returns `queued`, or `exists`: a task of this id has not ended."""

DRIVE = _script("""
-- node, at, lease in milliseconds
for _, id in ipairs(redis.call('ZRANGE', P .. 'pipelines', 0, -1)) do
  local f = get(id, 'state', 'type', 'attempt', 'failures', 'let_go')
  if f[2] ~= 'pipeline' or (f[1] ~= 'queued' and f[1] ~= 'running') then
    redis.call('ZREM', P .. 'pipelines', id)
  elseif redis.call('EXISTS', part(id, 'driver')) == 0 then
    if f[1] == 'running' and f[5] ~= f[3] then redis.call('HINCRBY', record(id), 'failures', 1) end
    local attempt = (tonumber(f[3]) or 0) + 1
    redis.call('SET', part(id, 'driver'), ARGV[1], 'PX', ARGV[3])
    redis.call('HSET', record(id), 'state', 'running', 'attempt', attempt, 'node_id', ARGV[1], 'worker_id', ARGV[1])
    if redis.call('HSETNX', record(id), 'started_at', ARGV[2]) == 1 then
      redis.call('PUBLISH', 'tasks.events', cjson.encode({type = 'TASK_STARTED', ts = ARGV[2], worker_id = 'queue',
        task_id = id, status = 'RUNNING', payload = {taskType = 'pipeline', started_at = ARGV[2]}}))
    end
    return {id, attempt}
  end
end
return {}
""")
"""Take the oldest pipeline that no driver has. Returns its id and the number of the driver; empty: there is none."""

RENEW = _script("""
-- id, driver's number, node, lease in milliseconds
if not mine(ARGV[1], ARGV[2]) then return {'lost', '', ''} end
redis.call('SET', part(ARGV[1], 'driver'), ARGV[3], 'PX', ARGV[4])
local f = get(ARGV[1], 'cancel', 'force')
return {'held', f[1] or '', f[2] or ''}
""")
"""Keep a pipeline. Returns `lost` if another driver has it, or it has ended; the reason of a cancel; '1' for force."""

SLOTS = _script("""
-- id, driver's number, how many slots there are now
if not mine(ARGV[1], ARGV[2]) then return -1 end
redis.call('HSETNX', record(ARGV[1]), 'slots', ARGV[3])
return tonumber(redis.call('HGET', record(ARGV[1]), 'slots'))
""")
"""The number of slots that the first driver saw: a later one divides a stage into the same shards. -1: lost."""

KEEP = _script("""
-- id, driver's number, of each stage that ended: its name, its end
if not mine(ARGV[1], ARGV[2]) then return 0 end
for i = 3, #ARGV, 2 do redis.call('HSET', part(ARGV[1], 'ends'), ARGV[i], ARGV[i + 1]) end
redis.call('HSET', record(ARGV[1]), 'failures', 0)
return 1
""")
"""Keep the ends of stages, of all that ran as one task. Returns 0 if another driver has the pipeline."""

SHOW = _script("""
-- id, driver's number, stage, where it stands, line for the log or ''
if not mine(ARGV[1], ARGV[2]) then return 0 end
redis.call('HSET', part(ARGV[1], 'stages'), ARGV[3], ARGV[4])
if ARGV[5] ~= '' then redis.call('XADD', part(ARGV[1], 'log'), 'MAXLEN', '~', 1000, '*', 'line', ARGV[5]) end
return 1
""")
"""Say where a stage stands."""

LET_GO = _script("""
-- id, driver's number, '1': it failed
if not mine(ARGV[1], ARGV[2]) then return 0 end
redis.call('DEL', part(ARGV[1], 'driver'))
redis.call('HSET', record(ARGV[1]), 'let_go', ARGV[2])
if ARGV[3] == '1' then redis.call('HINCRBY', record(ARGV[1]), 'failures', 1) end
redis.call('PUBLISH', 'flowmesh.queue', '{"type":"PIPELINE"}')
return 1
""")
"""Leave a pipeline to the next driver."""

END = _script("""
-- id, driver's number, at, event, ok, verdict, error, result or '', how long it is kept in seconds
local id = ARGV[1]
if not mine(id, ARGV[2]) then return 0 end
if ARGV[8] ~= '' then redis.call('SET', P .. 'result:' .. id, ARGV[8], 'EX', ARGV[9]) end
redis.call('XADD', part(id, 'log'), '*', 'end', '1')
redis.call('DEL', part(id, 'driver'), part(id, 'tasks'))
for _, name in ipairs({'ends', 'stages', 'log'}) do redis.call('EXPIRE', part(id, name), 86400) end
redis.call('ZREM', P .. 'pipelines', id)
finish(id, 86400, ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7])
return 1
""")
"""End a pipeline: its result and its one event. Returns 0 if another driver has it, or it has ended."""
