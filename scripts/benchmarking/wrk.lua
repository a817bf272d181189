-- Requests by wrk: wrk ... URL -- RUN USERS LOAD [NUMBER]
--   RUN    a number: keys and random numbers of no other run; one more than that of the run before
--   USERS  the requests are for the first so many accounts
--   LOAD   one of the functions of `loads`, which gets USERS, NUMBER, what its keys begin with, and what the run before
--          had its keys begin with
-- PORTS, in the environment: thread n goes to the nth of these ports, not to that of the URL.
-- The last line of the output is a JSON object: answers by status, replays, failures, seconds, latencies.

local RECENT_KEYS = 10000
local BULK_BODIES = 50
local SAMPLE = 100000

-- A load is called once in each thread and gives what wrk calls for each request. It makes beforehand what it can, so
-- that wrk takes as little of the machine as possible.
local loads = {}

local function withdrawal(user)
   return '{"userId":' .. user .. ',"amount":-2}'
end

local function post(path, body, key)
   return wrk.format("POST", path, { ["Content-Type"] = "application/json", ["Idempotency-Key"] = key }, body)
end

-- A withdrawal from a random account; of very many accounts, from one of a random sample of them.
function loads.update(users)
   local requests = {}
   for i = 1, math.min(users, SAMPLE) do
      requests[i] = post("/api/balance/update", withdrawal(users <= SAMPLE and i or math.random(users)))
   end
   return function() return requests[math.random(#requests)] end
end

-- So many of them in a request.
function loads.bulk(users, updates)
   local requests = {}
   for i = 1, BULK_BODIES do
      local parts = {}
      for part = 1, updates do parts[part] = withdrawal(math.random(users)) end
      requests[i] = post("/api/balance/updates", '{"updates":[' .. table.concat(parts, ",") .. "]}")
   end
   return function() return requests[math.random(BULK_BODIES)] end
end

-- A withdrawal with a key; so many percent repeat a recent one.
function loads.keyed(users, percent, prefix)
   local before, after, fresh = {}, {}, 0
   for user = 1, users do
      before[user], after[user] = post("/api/balance/update", withdrawal(user), "KEY"):match("^(.*)KEY(.*)$")
   end
   return function()
      local key = fresh + 1
      if fresh > 0 and math.random(100) <= percent then
         key = math.random(math.max(1, fresh - RECENT_KEYS), fresh)
      end
      fresh = math.max(fresh, key)
      local user = key % users + 1 -- a key belongs to one account
      return before[user] .. prefix .. key .. after[user]
   end
end

local function holds(method, body, prefix, after)
   local head, tail = wrk.format(
      method, "/api/users/1/holds/HOLD" .. after, { ["Content-Type"] = "application/json" }, body
   ):match("^(.*)HOLD(.*)$")
   local number = 0
   return function()
      number = number + 1
      return head .. prefix .. number .. tail
   end
end

-- A hold of the first account.
function loads.hold(_, _, prefix) return holds("PUT", '{"amount":2}', prefix, "") end

-- A capture of what the run before has placed with loads.hold, each hold once.
function loads.capture(_, _, _, prefix_before) return holds("POST", "{}", prefix_before, "/capture") end

-- A transfer between two accounts: from a random one to the first if `one_payee` is 1, else to a random one.
function loads.transfer(users, one_payee)
   local requests = {}
   for i = 1, 5 * users do
      local payee = one_payee == 1 and 1 or math.random(users)
      local payer = (payee + math.random(users - 1) - 1) % users + 1
      requests[i] = post(
         "/api/balance/transfer", '{"fromUserId":' .. payer .. ',"to":[{"userId":' .. payee .. ',"amount":2}]}'
      )
   end
   return function() return requests[math.random(#requests)] end
end

local threads = {}

function setup(thread)
   table.insert(threads, thread)
   thread:set("number", #threads)
   local ports = {}
   for port in os.getenv("PORTS"):gmatch("%d+") do table.insert(ports, port) end
   thread.addr = wrk.lookup("127.0.0.1", ports[#threads])[1]
end

function init(args)
   statuses, replays = {}, 0
   math.randomseed(tonumber(args[1]) * 100 + number)
   local function prefix(run) return run .. "-" .. number .. "-" end
   request = loads[args[3]](tonumber(args[2]), tonumber(args[4]), prefix(args[1]), prefix(args[1] - 1))
end

function response(status, headers)
   statuses[status] = (statuses[status] or 0) + 1
   if headers["Idempotent-Replayed"] then replays = replays + 1 end
end

function done(summary, latency)
   local counts, replayed, members = {}, 0, {}
   for _, thread in ipairs(threads) do
      for status, count in pairs(thread:get("statuses")) do counts[status] = (counts[status] or 0) + count end
      replayed = replayed + thread:get("replays")
   end
   for status, count in pairs(counts) do table.insert(members, string.format('"%d":%d', status, count)) end
   print(string.format(
      '{"statuses":{%s},"replays":%d,"failures":%d,"seconds":%.6f,"latencies":{"p50_ms":%.3f,"p99_ms":%.3f,"max_ms":%.3f}}',
      table.concat(members, ","), replayed,
      summary.errors.connect + summary.errors.read + summary.errors.write,
      summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
