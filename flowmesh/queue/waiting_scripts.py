"""Looks at what waits in the queue, and takes entries out of it, as Redis scripts: each sees one moment."""

from __future__ import annotations

from flowmesh.queue.lua import Script

LOOK = Script.of("""
-- class key, priority, how many, '1': only those of one owner, the owner
local b, limit, only = base(ARGV[1], ARGV[2]), tonumber(ARGV[3]), ARGV[4] == '1' and ARGV[5] or nil
local found = {}
local function claimed(key)
  return redis.call('EXISTS', key) == 1 and redis.call('XPENDING', key, 'flowmesh')[1] or 0
end
local function read(key, from, many)
  local raw = redis.call('XRANGE', key, from, '+', 'COUNT', claimed(key) + many)
  local rows = {}
  for _, row in ipairs(raw) do
    local f = get(row[2][2], 'state', 'stream', 'entry', 'owner')
    if row[1] ~= from and f[1] == 'queued' and f[2] == key and f[3] == row[1] then
      rows[#rows + 1] = {row[2][2], f[4]}
    end
  end
  return rows, #raw > 0 and raw[#raw][1] or from
end
local function note(position, row, place)
  if (not only or row[2] == only) and #found < limit then found[#found + 1] = {position, row[1], place} end
end
local position, front = 0, b .. ':front'
for _, row in ipairs((read(front, '-', only and 10000 or limit))) do
  position = position + 1
  note(position, row, 'front')
end
position = math.max(position, redis.call('XLEN', front) - claimed(front))
local owners, lengths, at = redis.call('ZRANGE', b .. ':ring', 0, -1), {}, nil
for i, owner in ipairs(owners) do
  local key = b .. ':o:' .. owner
  lengths[i] = redis.call('XLEN', key) - claimed(key)
  if owner == only then at = i end
end
if only then
  if not at then return found end
  local before, after = {}, {}
  for n = 0, limit + 1 do before[n], after[n] = 0, 0 end
  for i, length in ipairs(lengths) do
    local n = math.min(length, limit + 1)
    if i < at then before[n] = before[n] + 1 elseif i > at then after[n] = after[n] + 1 end
  end
  for n = limit, 1, -1 do
    before[n], after[n] = before[n] + before[n + 1], after[n] + after[n + 1]
  end
  local key = b .. ':o:' .. only
  for n, row in ipairs((read(key, '-', limit))) do
    position = position + 1 + before[n] + (n > 1 and after[n - 1] or 0)
    note(position, row, 'turn')
  end
  return found
end
local streams, round, more = {}, 1, true
while more and #found < limit do
  more = false
  for i, owner in ipairs(owners) do
    if #found < limit and lengths[i] >= round then
      more = true
      local s = streams[i] or {rows = {}, last = '-', taken = 0}
      streams[i] = s
      if not s.rows[round - s.taken] then
        s.taken = round - 1
        s.rows, s.last = read(b .. ':o:' .. owner, s.last, 16)
      end
      local row = s.rows[round - s.taken]
      if row then
        position = position + 1
        note(position, row, 'turn')
      end
    end
  end
  round = round + 1
end
return found
""")
"""The entries of a class and priority in the order in which claims take them: what came back, then owners in turn.

Returns `[position, task, front|turn]` of each. Of one owner, the entries of others are counted and not read; what came
back is looked through up to 10,000.
"""

REMOVE = Script.of("""
-- id, at, reason
local f = get(ARGV[1], 'state', 'worker_id')
if f[1] ~= 'queued' then return {f[1] or 'unknown', f[2] or ''} end
end_waiting(ARGV[1], ARGV[2], ARGV[3])
return {'queued', ''}
""")
"""Take a task out of the queue, unless a worker has claimed it. Returns the state that it was in, and who has it."""
