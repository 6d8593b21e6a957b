"""The Lua that all of the queue's scripts begin with, and what a script is."""

from __future__ import annotations

import hashlib

import msgspec

_PRELUDE = """
local P = 'flowmesh:'
local WAITING = P .. 'queue:waiting'
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
local function record(id) return P .. 'task:' .. id end
local function base(ck, priority) return P .. 'queue:c:' .. ck .. ':' .. priority end
local function get(id, ...) return redis.call('HMGET', record(id), ...) end
local function count(ck, priority, by)
  if redis.call('HINCRBY', WAITING, ck .. ':' .. priority, by) <= 0 then
    redis.call('HDEL', WAITING, ck .. ':' .. priority)
    redis.call('DEL', base(ck, priority) .. ':ring')
  end
end
local function waiting(ck)
  local n = 0
  for _, v in ipairs(redis.call('HMGET', WAITING, ck .. ':high', ck .. ':normal', ck .. ':low')) do
    n = n + (tonumber(v) or 0)
  end
  return n
end
local function wake(ck)
  local key = P .. 'queue:c:' .. ck .. ':wake'
  if redis.call('LLEN', key) == 0 then redis.call('LPUSH', key, '1') end
end
local function add(id, front)
  local f = get(id, 'class', 'priority', 'owner')
  local ck, priority, owner = f[1], f[2], f[3]
  local b = base(ck, priority)
  local key = front and (b .. ':front') or (b .. ':o:' .. owner)
  if redis.call('EXISTS', key) == 0 then redis.call('XGROUP', 'CREATE', key, 'flowmesh', '0', 'MKSTREAM') end
  local entry = redis.call('XADD', key, '*', 'task', id)
  if not front then
    if not redis.call('ZSCORE', b .. ':ring', owner) then
      redis.call('ZADD', b .. ':ring', redis.call('INCR', P .. 'queue:turn'), owner)
    end
  end
  redis.call('HSET', record(id), 'state', 'queued', 'stream', key, 'entry', entry)
  count(ck, priority, 1)
  redis.call('ZADD', P .. 'queue:classes', now_ms(), redis.call('HGET', record(id), 'class_json'))
  wake(ck)
end
local function last_read(key)
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    for i = 1, #group, 2 do
      if group[i] == 'last-delivered-id' then return group[i + 1] end
    end
  end
end
local function gang_place(priority, ms) return ({high = 0, normal = 1, low = 2})[priority] * 1e13 + ms end
local function drop_entry(key, entry)
  if not key or not entry or redis.call('EXISTS', key) == 0 then return end
  redis.call('XACK', key, 'flowmesh', entry)
  redis.call('XDEL', key, entry)
  if redis.call('XLEN', key) == 0 then redis.call('DEL', key) end
end
local function forget_entry(id)
  local f = get(id, 'stream', 'entry')
  drop_entry(f[1], f[2])
  redis.call('HDEL', record(id), 'stream', 'entry')
end
local function let_go(worker, id, attempt)
  local key = P .. 'queue:held:' .. worker
  if redis.call('HGET', key, id) == tostring(attempt) then redis.call('HDEL', key, id) end
  if redis.call('EXISTS', key) == 0 then redis.call('SREM', P .. 'queue:holders', worker) end
end
local function evidence(id, text)
  local key = P .. 'attempts:' .. id
  redis.call('RPUSH', key, text)
  redis.call('LTRIM', key, -50, -1)
end
local function finish(id, ttl, at, event, ok, verdict, error)
  local now = now_ms()
  forget_entry(id)
  redis.call('HSET', record(id), 'state', 'done', 'ended_at', at, 'ok', ok, 'verdict', verdict, 'error', error,
    'end', event)
  redis.call('HDEL', record(id), 'message', 'class_json')
  redis.call('ZREM', P .. 'tasks:open', id)
  redis.call('ZADD', P .. 'tasks:done', now, id)
  redis.call('ZREMRANGEBYSCORE', P .. 'tasks:done', '-inf', now - 86400000)
  redis.call('EXPIRE', record(id), ttl)
  if redis.call('EXISTS', P .. 'attempts:' .. id) == 1 then redis.call('EXPIRE', P .. 'attempts:' .. id, ttl) end
  redis.call('PUBLISH', 'tasks.events', event)
end
local function failed_event(id, worker, at, kind, error)
  local f = get(id, 'type', 'started_at')
  return cjson.encode({type = 'TASK_FAILED', ts = at, worker_id = worker, task_id = id, status = 'FAILED',
    error = error, payload = {taskType = f[1] or cjson.null, runtime_sec = 0, started_at = f[2] or cjson.null,
    finished_at = at, error_kind = kind, retryable = kind ~= 'cancelled', exit = cjson.null}})
end
local function end_waiting(id, at, reason)
  local f = get(id, 'class', 'priority')
  if f[1] and f[1] ~= '' then count(f[1], f[2], -1) end
  finish(id, 86400, at, failed_event(id, 'queue', at, 'cancelled', reason), '0', 'cancelled', reason)
end
"""

RECORD_TTL_S = 86_400
"""How long the record of a task that has ended stays."""


class Script(msgspec.Struct, frozen=True):
    """A script and its name in Redis' cache."""

    text: str
    sha: str

    @classmethod
    def of(cls, body: str) -> Script:
        text = _PRELUDE + body
        return cls(text, hashlib.sha1(text.encode()).hexdigest())
