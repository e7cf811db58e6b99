-- Ask a living worker for something; it hears of it on its blocking connection.
-- KEYS  1 leases  2 requests of that worker
-- ARGV  1 that worker  2 what is asked: "report" | "cancel <id>"
-- Returns  1, or 0 if it has no lease
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[2], 0, ARGV[2])
redis.call('PEXPIRE', KEYS[2], 60000)
return 1
