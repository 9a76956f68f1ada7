-- KEYS: marker, lists   ARGV: text, lifetime of the marker, lifetime of the lists in ms or 0, channel or ''
if not redis.call('SET', KEYS[1], '1', 'NX', 'EX', ARGV[2]) then
    return 0
end
for i = 2, #KEYS do
    redis.call('LPUSH', KEYS[i], ARGV[1])
    if ARGV[3] ~= '0' then
        redis.call('PEXPIRE', KEYS[i], ARGV[3])
    end
end
if ARGV[4] ~= '' then
    redis.call('PUBLISH', ARGV[4], ARGV[1])
end
return 1
