"""The Lua that the scripts of gangs share: what a gang's hash has, how it ends, and how it goes back to the queue.

A formed gang has one hash, of its current attempt, with these fields for each member, which end with its rank:
`worker:`, `node:`, `state:` (claimed, joined, running, done), `seen:` and `member:` (its end as JSON). The attempt of
the task's record is the fence, as for any task.
"""

from __future__ import annotations

from flowmesh.queue.lua import Script

JOIN_MS = 10_000
"""How long a formed gang waits for its members to join; then all of it waits in the queue again."""
LATE_MS = 5_000
"""A member that was itself not heard for so long suspects no other one for a while: Redis was away for all."""

_GANG = (
    f"""
local JOIN_MS, LATE_MS = {JOIN_MS}, {LATE_MS}
"""
    + """
local GANGS, FORMED = P .. 'queue:gangs', P .. 'queue:gangs:formed'
local function gang(id) return P .. 'gang:' .. id end
local function offers(id) return gang(id) .. ':offers' end
local function offer(worker) return P .. 'queue:offer:' .. worker end
local function say(message) redis.call('PUBLISH', 'flowmesh.queue', cjson.encode(message)) end
local function is_current(id, attempt)
  local f = get(id, 'attempt', 'state')
  return f[1] == attempt and (f[2] == 'claimed' or f[2] == 'running') and redis.call('EXISTS', gang(id)) == 1
end
local function dissolve(id)
  for rank = 0, tonumber(redis.call('HGET', gang(id), 'size') or 0) - 1 do
    local key = offer(redis.call('HGET', gang(id), 'worker:' .. rank))
    if redis.call('HGET', key, 'gang') == id then redis.call('DEL', key) end
  end
  redis.call('DEL', gang(id))
  redis.call('ZREM', FORMED, id)
end
local function wait_again(id)
  redis.call('HSET', record(id), 'state', 'queued')
  redis.call('HDEL', record(id), 'started_at', 'claimed_at', 'size')
  redis.call('DEL', P .. 'result:' .. id)
  redis.call('ZADD', GANGS, gang_place(redis.call('HGET', record(id), 'priority'), now_ms() - 1e12), id)
  say({type = 'CLASS'})
end
local function send_back(id, at, reason)
  local f = get(id, 'attempt', 'cancel')
  dissolve(id)
  if f[2] then
    finish(id, 86400, at, failed_event(id, 'queue', at, 'cancelled', f[2]), '0', 'cancelled', f[2])
  else
    wait_again(id)
  end
  say({type = 'GANG_ENDS', task_id = id, attempt = tonumber(f[1]), kind = 'back', reason = reason})
end
local function announce(id, kind, reason)
  local before = redis.call('HGET', gang(id), 'ending')
  if before and (before ~= 'finished' or kind == 'finished') then return end
  redis.call('HSET', gang(id), 'ending', kind, 'reason', reason)
  say({type = 'GANG_ENDS', task_id = id, attempt = tonumber(redis.call('HGET', gang(id), 'attempt')), kind = kind,
    reason = reason})
end
local function fail(id, verdict, retryable, error, event, node, avoid_ms)
  if redis.call('HSETNX', gang(id), 'verdict', verdict) == 0 then return end
  redis.call('HSET', gang(id), 'retryable', retryable, 'error', error, 'failed', event, 'avoid', node,
    'avoid_ms', avoid_ms)
  announce(id, verdict == 'drained' and 'drained' or 'failed', error)
end
local function with_members(id, event)
  local ends = {}
  for rank = 0, tonumber(redis.call('HGET', gang(id), 'size')) - 1 do
    ends[#ends + 1] = redis.call('HGET', gang(id), 'member:' .. rank)
  end
  local _, last = string.find(event, '"payload":{', 1, true)
  return string.sub(event, 1, last) .. '"members":[' .. table.concat(ends, ',') .. '],' .. string.sub(event, last + 1)
end
local function conclude(id, at)
  for rank = 0, tonumber(redis.call('HGET', gang(id), 'size')) - 1 do
    if redis.call('HGET', gang(id), 'state:' .. rank) ~= 'done' then return 'kept' end
  end
  local g = redis.call('HMGET', gang(id), 'verdict', 'retryable', 'error', 'failed', 'avoid', 'avoid_ms', 'event')
  local f = get(id, 'attempt', 'retries', 'failures', 'cancel', 'worker_id')
  local event = with_members(id, g[1] and g[4] or g[7])
  dissolve(id)
  if not g[1] then
    finish(id, 86400, at, event, '1', 'ok', '')
    return 'published'
  end
  local failures, counted = tonumber(f[3]) or 0, g[1] ~= 'drained'
  if not f[4] and (not counted or (g[2] == '1' and failures < (tonumber(f[2]) or 0))) then
    if counted then redis.call('HSET', record(id), 'failures', failures + 1) end
    if g[6] ~= '0' then redis.call('HSET', record(id), 'avoid', g[5], 'avoid_until', now_ms() + g[6]) end
    wait_again(id)
    say({type = 'ATTEMPT_FAILED', ts = at, task_id = id, worker_id = f[5], attempt = tonumber(f[1]),
      error_kind = g[1], error = g[3]})
    return 'requeued'
  end
  redis.call('DEL', P .. 'result:' .. id)
  finish(id, 86400, at, event, '0', g[1], g[3])
  return 'published'
end
local function lost(id, rank, at)
  local g = redis.call('HMGET', gang(id), 'worker:' .. rank, 'node:' .. rank, 'attempt')
  local error = 'member ' .. rank .. ' on ' .. g[1] .. ': its node is gone: it was not heard any more'
  local told = {attempt = tonumber(g[3]), rank = rank, worker_id = g[1], node_id = g[2], ended_at = at, ok = false,
    error_kind = 'supervisor_lost', error = error}
  evidence(id, cjson.encode(told))
  redis.call('HSET', gang(id), 'state:' .. rank, 'done', 'member:' .. rank, cjson.encode({rank = rank,
    worker_id = g[1], node_id = g[2], verdict = 'supervisor_lost', error = error}))
  fail(id, 'supervisor_lost', '1', error, failed_event(id, g[1], at, 'supervisor_lost', error), g[2], '0')
end
local function late(id, silence_ms)
  local found, now = {}, now_ms()
  for rank = 0, tonumber(redis.call('HGET', gang(id), 'size')) - 1 do
    local g = redis.call('HMGET', gang(id), 'state:' .. rank, 'seen:' .. rank)
    local limit = g[1] == 'claimed' and JOIN_MS or silence_ms
    if g[1] ~= 'done' and now - tonumber(g[2]) > limit then found[#found + 1] = {rank, g[1]} end
  end
  return found
end
local function end_late(id, at, found)
  for _, each in ipairs(found) do
    if each[2] == 'claimed' then return send_back(id, at, 'a member did not join') end
  end
  for _, each in ipairs(found) do lost(id, each[1], at) end
  if #found > 0 then conclude(id, at) end
end
"""
)


def gang_script(body: str) -> Script:
    """A script of gangs."""
    return Script.of(_GANG + body)
