-- KEYS: the lists of all queues by class; the list of parked elements of each queue; index; record
-- ARGV: classes, in turns, number of messages, bytes, limit of a body, limit with an eta;
--     end of an entry, room, is recorded of each queue; fields
local classes, in_turns = tonumber(ARGV[1]), ARGV[2] == '1'
local most, most_bytes = tonumber(ARGV[3]), tonumber(ARGV[4])
local max_body, max_waiting = tonumber(ARGV[5]), tonumber(ARGV[6])
local queues = (#KEYS - 2) / (classes + 1)
local parking, index, record = classes * queues, KEYS[#KEYS - 1], KEYS[#KEYS]
local rooms, fields = {}, 6 + 3 * queues
for i = 1, queues do
    rooms[i] = tonumber(ARGV[5 + 3 * i])
end
local time = redis.call('TIME')

-- Each later one is a microsecond younger, so that the order can be restored.
local function age(position)
    local micros = time[2] + position
    return string.format('%d.%06d', time[1] + math.floor(micros / 1000000), micros % 1000000)
end

local taken, count, bytes, parked = {}, 0, 0, 0

-- Returns the message, if the text is one.
local function decode(text)
    local is_json, message = pcall(cjson.decode, text)
    if is_json and type(message) == 'table' and type(message.properties) == 'table'
        and type(message.properties.delivery_tag) == 'string'
        and type(message.properties.delivery_info) == 'table' then
        return message
    end
end

-- What the worker gets of an element, and the size of the body that it does not get; nothing for one that is parked.
local function show(text, is_recorded)
    if not is_recorded and #text <= max_body then
        return text, 0
    end
    local message = decode(text)
    if message then
        -- What is not recorded could not be fetched later.
        return shorten(text, message, message, max_body, is_recorded and max_waiting or max_body)
    end
end

local function take(i, list)
    while rooms[i] > 0 and count < most and bytes < most_bytes and parked < 100 do
        local text = redis.call('RPOP', list)
        if not text then
            return false
        end
        local is_recorded = ARGV[6 + 3 * i] == '1'
        local is_read, shown, omitted = pcall(show, text, is_recorded)
        if is_read and shown then
            count = count + 1
            if is_recorded then
                local field = ARGV[fields + count]
                redis.call('HSET', record, field, '[' .. text .. ARGV[4 + 3 * i])
                redis.call('ZADD', index, age(count), field)
            end
            taken[#taken + 1] = i - 1
            taken[#taken + 1] = shown
            taken[#taken + 1] = omitted
            rooms[i] = rooms[i] - 1
            -- A body that is within the first limit may be fetched.
            bytes = bytes + (omitted > max_body and #shown or #text)
            return true
        end
        redis.call('LPUSH', KEYS[parking + i], text)
        parked = parked + 1
    end
    return false
end

for class = 0, classes - 1 do
    local is_taking = true
    while is_taking do
        is_taking = false
        for i = 1, queues do
            while take(i, KEYS[class * queues + i]) do
                is_taking = true
                if in_turns then
                    break
                end
            end
        end
    end
end
return {parked, taken}
