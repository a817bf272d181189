-- Withdrawals by wrk: wrk ... URL -- USERS UPDATES REPLAY_PERCENT RUN
--   USERS           each request withdraws 2 from a random one of the first so many users
--   UPDATES         how many updates a request has: more than 1 for the bulk endpoint
--   REPLAY_PERCENT  how many requests repeat an earlier key; "none" sends no keys
--   RUN             a number: keys and random numbers of no other run
-- PORTS, in the environment: thread n goes to the nth of these ports, not to that of the URL.
-- The last line of the output is a JSON object: answers by status, replays, failures, seconds, latencies.

local RECENT_KEYS = 10000
local BULK_BODIES = 50

local threads = {}

function setup(thread)
   table.insert(threads, thread)
   thread:set("number", #threads)
   local nth = 0
   for port in (os.getenv("PORTS") or ""):gmatch("%d+") do
      nth = nth + 1
      if nth == #threads then thread.addr = wrk.lookup("127.0.0.1", port)[1] end
   end
end

local function withdrawal(user)
   return '{"userId":' .. user .. ',"amount":-2}'
end

local function bulk(users, updates)
   local parts = {}
   for i = 1, updates do parts[i] = withdrawal(math.random(users)) end
   return '{"updates":[' .. table.concat(parts, ",") .. "]}"
end

function init(args)
   local users, updates, percent = tonumber(args[1]), tonumber(args[2]), tonumber(args[3])
   local prefix = args[4] .. "-" .. number .. "-"
   statuses, replays = {}, 0
   math.randomseed(tonumber(args[4]) * 100 + number)

   -- The requests are made beforehand, so that wrk takes as little of the machine as it can.
   local requests = {}
   for i = 1, updates > 1 and BULK_BODIES or users do
      local body = updates > 1 and bulk(users, updates) or withdrawal(i)
      local headers = { ["Content-Type"] = "application/json", ["Idempotency-Key"] = percent and "KEY" or nil }
      requests[i] = wrk.format("POST", nil, headers, body)
   end
   if not percent then
      request = function() return requests[math.random(#requests)] end
      return
   end

   local before, after = {}, {}
   for i, text in ipairs(requests) do before[i], after[i] = text:match("^(.*)KEY(.*)$") end
   local fresh = 0
   request = function()
      local key
      if fresh > 0 and math.random(100) <= percent then
         key = math.random(math.max(1, fresh - RECENT_KEYS), fresh)
      else
         fresh = fresh + 1
         key = fresh
      end
      local user = key % users + 1  -- a key belongs to one user
      return before[user] .. prefix .. key .. after[user]
   end
end

function response(status, headers)
   statuses[status] = (statuses[status] or 0) + 1
   if headers["Idempotent-Replayed"] then replays = replays + 1 end
end

function done(summary, latency)
   local counts, replayed = {}, 0
   for _, thread in ipairs(threads) do
      for status, count in pairs(thread:get("statuses")) do counts[status] = (counts[status] or 0) + count end
      replayed = replayed + thread:get("replays")
   end
   local members = {}
   for status, count in pairs(counts) do table.insert(members, string.format('"%d":%d', status, count)) end
   print(string.format(
      '{"statuses":{%s},"replays":%d,"failures":%d,"seconds":%.6f,"p50_ms":%.3f,"p99_ms":%.3f}',
      table.concat(members, ","), replayed,
      summary.errors.connect + summary.errors.read + summary.errors.write,
      summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
