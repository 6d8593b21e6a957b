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
local function read(key, many)
  local skipped = claimed(key)
  local rows = redis.call('XRANGE', key, '-', '+', 'COUNT', skipped + many)
  for _ = 1, skipped do table.remove(rows, 1) end
  return rows
end
local function note(position, row, key, place)
  local id = row[2][2]
  local f = get(id, 'state', 'stream', 'entry', 'owner')
  local waits = f[1] == 'queued' and f[2] == key and f[3] == row[1]
  if waits and (not only or f[4] == only) and #found < limit then found[#found + 1] = {position, id, place} end
  return waits
end
local position, front = 0, b .. ':front'
for _, row in ipairs(read(front, only and 10000 or limit)) do
  if note(position + 1, row, front, 'front') then position = position + 1 end
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
  for n, row in ipairs(read(key, limit)) do
    position = position + 1 + before[n] + (n > 1 and after[n - 1] or 0)
    note(position, row, key, 'turn')
  end
  return found
end
local rows, taken = {}, {}
local round, more = 1, true
while more and #found < limit do
  more = false
  for i, owner in ipairs(owners) do
    if #found < limit and lengths[i] >= round then
      more = true
      local key = b .. ':o:' .. owner
      if not rows[i] or not rows[i][round - taken[i]] then
        local last = rows[i] and rows[i][#rows[i]]
        local next_rows = last and redis.call('XRANGE', key, last[1], '+', 'COUNT', 17) or read(key, 16)
        if last then table.remove(next_rows, 1) end
        rows[i], taken[i] = next_rows, round - 1
      end
      local row = rows[i][round - taken[i]]
      if row and note(position + 1, row, key, 'turn') then position = position + 1 end
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
