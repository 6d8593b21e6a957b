"""Tasks on several nodes, as Redis scripts: members are claimed all at once or not at all, and end as one task.

    queued ---- OFFER, the last one that it needs ----> claimed ---- STARTED of rank 0 ----> running
      ^                                                    |                                    |
      |--- GIVE_BACK, SWEEP (a member did not join) -------'                                    |
      '--- END of the last member (retryable, drained) -----------------------------------------'
    claimed | running ---- END of the last member ----> done: the one event on tasks.events

An idle worker offers itself for some seconds to the gangs that it fits; it may take anything else meanwhile. A gang
has a place in a sorted set while it waits, and is in no stream: nodes that do not know gangs never see it.
"""

from __future__ import annotations

from flowmesh.queue.gang_lua import gang_script

OFFER_MS = 5_000
"""How long an offer counts."""
SETTLE_MS = 2_000
"""How long a gang that may have more members waits for them once it has enough."""

LIST = gang_script("""
-- how many at most
local found = {}
for _, id in ipairs(redis.call('ZRANGE', GANGS, 0, tonumber(ARGV[1]) - 1)) do
  local f = get(id, 'state', 'class_json', 'priority', 'timeout', 'least', 'avoid', 'avoid_until')
  if f[1] ~= 'queued' then
    redis.call('ZREM', GANGS, id)
  else
    local avoid = (tonumber(f[7]) or 0) > now_ms() and f[6] or ''
    found[#found + 1] = {id, f[2], f[3], f[4] or '', f[5], avoid}
  end
end
return {now_ms(), found}
""")
"""The gangs that wait, in order: `[now in ms, [id, class, priority, time limit or '', least nodes, node to avoid]]`."""

OFFER = gang_script("""
-- worker, node, at, address, port, how long in ms, time to settle in ms, gangs in the order of preference
local worker, node, at, life = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[6])
local now = now_ms()
local function membership(id, attempt, rank)
  local g = redis.call('HMGET', gang(id), 'size', 'host', 'port', 'rdzv')
  local f = get(id, 'priority', 'message')
  return {'member', id, tonumber(attempt), tonumber(rank), tonumber(g[1]), g[2], tonumber(g[3]), g[4], f[1], f[2]}
end
local function candidates(id, avoid, first)
  local seen, found = {}, {}
  for _, each in ipairs(redis.call('ZRANGE', offers(id), 0, -1)) do
    local o = redis.call('HMGET', offer(each), 'node', 'host', 'port', 'gang')
    if o[1] and not o[4] and not seen[o[1]] and o[1] ~= avoid then
      seen[o[1]] = true
      table.insert(found, o[1] == first and 1 or #found + 1, {each, o[1], o[2], o[3]})
    end
  end
  return found
end
local function form(id)
  local f = get(id, 'least', 'most', 'attempt', 'avoid', 'avoid_until', 'node_id')
  local most = tonumber(f[2])
  local found = candidates(id, (tonumber(f[5]) or 0) > now and f[4] or '', f[6])
  local since = offers(id) .. ':since'
  if #found < tonumber(f[1]) then
    redis.call('DEL', since)
    return nil
  end
  if #found < most then
    redis.call('SET', since, now, 'NX', 'PX', life + tonumber(ARGV[7]))
    if now - tonumber(redis.call('GET', since)) < tonumber(ARGV[7]) then return nil end
  end
  local attempt, size = tonumber(f[3]) + 1, math.min(#found, most)
  redis.call('DEL', gang(id), offers(id), since)
  redis.call('HSET', gang(id), 'attempt', attempt, 'size', size, 'host', found[1][3], 'port', found[1][4],
    'rdzv', id .. '-' .. attempt)
  local workers, own = {}, nil
  for rank = 0, size - 1 do
    local each = found[rank + 1]
    redis.call('HSET', gang(id), 'worker:' .. rank, each[1], 'node:' .. rank, each[2], 'state:' .. rank, 'claimed',
      'seen:' .. rank, now)
    redis.call('HSET', offer(each[1]), 'gang', id, 'attempt', attempt, 'rank', rank)
    redis.call('PEXPIRE', offer(each[1]), JOIN_MS)
    workers[rank + 1] = each[1]
    if each[1] == worker then own = rank end
  end
  redis.call('ZREM', GANGS, id)
  redis.call('ZADD', FORMED, now, id)
  redis.call('HSET', record(id), 'state', 'claimed', 'attempt', attempt, 'worker_id', found[1][1],
    'node_id', found[1][2], 'claimed_at', at, 'size', size)
  redis.call('HDEL', record(id), 'avoid', 'avoid_until')
  say({type = 'GANG', task_id = id, workers = workers})
  return own and membership(id, attempt, own) or {'offered'}
end
local held = redis.call('HMGET', offer(worker), 'gang', 'attempt', 'rank')
if held[1] then
  if is_current(held[1], held[2]) then return membership(unpack(held)) end
  redis.call('DEL', offer(worker))
end
if redis.call('EXISTS', 'worker:' .. worker .. ':hb') == 0 then return {'unregistered'} end
if redis.call('SISMEMBER', 'workers:elastic_disabled', worker) == 1 then return {'disabled'} end
if #ARGV < 8 then
  redis.call('DEL', offer(worker))
  return {'none'}
end
redis.call('HSET', offer(worker), 'node', node, 'host', ARGV[4], 'port', ARGV[5])
redis.call('PEXPIRE', offer(worker), life)
for i = 8, #ARGV do
  local id = ARGV[i]
  if get(id, 'state')[1] == 'queued' then
    redis.call('ZADD', offers(id), now + life, worker)
    redis.call('ZREMRANGEBYSCORE', offers(id), '-inf', now)
    redis.call('PEXPIRE', offers(id), life)
    local got = form(id)
    if got then return got end
  end
end
return {'offered'}
""")
"""Offer an idle worker to gangs; the offer that completes one claims all of its members.

Returns `[member, id, attempt, rank, size, address, port, rendezvous, priority, document]` where this worker is one,
also by the offer of another; `[offered]`; `[none]`; `[unregistered]`; `[disabled]`.
"""

JOIN = gang_script("""
-- id, attempt, rank, worker
redis.call('DEL', offer(ARGV[4]))
if not is_current(ARGV[1], ARGV[2]) then return 0 end
if redis.call('HGET', gang(ARGV[1]), 'state:' .. ARGV[3]) ~= 'claimed' then return 1 end
redis.call('HSET', gang(ARGV[1]), 'state:' .. ARGV[3], 'joined', 'seen:' .. ARGV[3], now_ms())
return 1
""")
"""A member is in its node's journal. Returns 0 if the gang has gone back meanwhile."""

GIVE_BACK = gang_script("""
-- worker, at, reason
local held = redis.call('HMGET', offer(ARGV[1]), 'gang', 'attempt')
redis.call('DEL', offer(ARGV[1]))
if not held[1] or not is_current(held[1], held[2]) then return 0 end
send_back(held[1], ARGV[2], ARGV[3])
return 1
""")
"""A worker is not idle any more: its offer ends. If it is a member by now, its gang waits again; that is no failure."""

STARTED = gang_script("""
-- id, attempt, rank, worker, node, event, at
local id, rank = ARGV[1], ARGV[3]
if not get(id, 'state')[1] then
  if rank == '0' then redis.call('PUBLISH', 'tasks.events', ARGV[6]) end
  return 'kept'
end
if not is_current(id, ARGV[2]) or redis.call('HGET', gang(id), 'state:' .. rank) == 'done' then return 'stale' end
redis.call('HSET', gang(id), 'state:' .. rank, 'running', 'seen:' .. rank, now_ms())
if rank ~= '0' then return 'kept' end
redis.call('HSET', record(id), 'state', 'running', 'started_at', ARGV[7])
redis.call('PUBLISH', 'tasks.events', ARGV[6])
return 'published'
""")
"""A member has started. Rank 0's event is the gang's."""

BEAT = gang_script("""
-- id, attempt, rank, at, silence in ms, what stops it or '', why
local id, rank = ARGV[1], ARGV[3]
local f = get(id, 'state', 'cancel')
if not f[1] then return {'unknown'} end
if not is_current(id, ARGV[2]) or redis.call('HGET', gang(id), 'state:' .. rank) == 'done' then return {'stale'} end
local now = now_ms()
local g = redis.call('HMGET', gang(id), 'seen:' .. rank, 'calm')
redis.call('HSET', gang(id), 'seen:' .. rank, now)
if now - tonumber(g[1]) > LATE_MS then
  redis.call('HSET', gang(id), 'calm', now + ARGV[5])
elseif now > (tonumber(g[2]) or 0) then
  end_late(id, ARGV[4], late(id, tonumber(ARGV[5])))
  if not is_current(id, ARGV[2]) then return {'stale'} end
end
if ARGV[6] ~= '' then announce(id, ARGV[6] == 'drained' and 'drained' or 'failed', ARGV[7]) end
if f[2] then return {'ending', 'cancelled', f[2]} end
local ending = redis.call('HMGET', gang(id), 'ending', 'reason')
return ending[1] and {'ending', ending[1], ending[2]} or {'held'}
""")
"""A member's sign of life. It ends members that gave none for too long, and says whether the gang is to end.

Returns `[held]`, `[ending, kind, reason]` (`cancelled`, `drained`, `failed`, or `finished`: rank 0 has succeeded),
`[stale]` (the gang is in another attempt, or has ended), or `[unknown]` (its record is gone).
"""

END = gang_script("""
-- id, attempt, rank, worker, node, event, at, ok, verdict, retryable, error, evidence, member, result, ttl, avoid in ms
local id, attempt, rank, worker, node, event, at, ok, verdict = unpack(ARGV, 1, 9)
local f = get(id, 'state', 'cancel')
if not f[1] then
  if rank == '0' then redis.call('PUBLISH', 'tasks.events', event) end
  return 'kept'
end
if not is_current(id, attempt) then return 'stale' end
if redis.call('HGET', gang(id), 'state:' .. rank) == 'done' then return 'again' end
redis.call('HSET', gang(id), 'state:' .. rank, 'done', 'member:' .. rank, ARGV[13])
evidence(id, ARGV[12])
if ok == '1' and rank == '0' then
  redis.call('HSET', gang(id), 'event', event)
  if ARGV[14] ~= '' and ARGV[15] ~= '0' then redis.call('SET', P .. 'result:' .. id, ARGV[14], 'EX', ARGV[15]) end
  announce(id, 'finished', 'rank 0 has succeeded')
elseif ok ~= '1' then
  local let_go = verdict == 'cancelled' and not f[2] and redis.call('HEXISTS', gang(id), 'event') == 1
  if not let_go then fail(id, verdict, ARGV[10], ARGV[11], event, node, ARGV[16]) end
end
return conclude(id, at)
""")
"""A member has ended, and its slot is free. The first one that failed decides; the last one ends the gang.

Returns `kept` (others have not ended), `published`, `requeued`, `stale` or `again`.
"""

SWEEP = gang_script("""
-- at, silence in ms
local ended = 0
for _, id in ipairs(redis.call('ZRANGE', FORMED, 0, 199)) do
  local state = get(id, 'state')[1]
  if (state ~= 'claimed' and state ~= 'running') or redis.call('EXISTS', gang(id)) == 0 then
    if state == 'claimed' or state == 'running' then send_back(id, ARGV[1], 'its members are not known') end
    redis.call('ZREM', FORMED, id)
  else
    local found = late(id, tonumber(ARGV[2]))
    local suspect = tonumber(redis.call('HGET', gang(id), 'suspect'))
    if #found == 0 then
      redis.call('HDEL', gang(id), 'suspect')
    elseif not suspect then
      redis.call('HSET', gang(id), 'suspect', now_ms())
    elseif now_ms() - suspect > tonumber(ARGV[2]) then
      end_late(id, ARGV[1], found)
      ended = ended + 1
    end
  end
end
return ended
""")
"""End gangs whose members are all gone, so that none of them does it. Returns how many lost members."""
