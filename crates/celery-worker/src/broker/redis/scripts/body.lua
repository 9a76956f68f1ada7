-- Bodies of messages, within the texts of messages or entries. Large ones stay in Redis: a worker gets the rest of the
-- text.

-- Position of a body's first and last byte within a text. None for a body with escaped characters: with the quotes, a
-- candidate ends at the next quote, so that no text makes the search slow.
local function body_range(text, body)
    if string.find(body, '"', 1, true) or string.find(body, '\\', 1, true) then
        return nil
    end
    local from, to = string.find(text, '"' .. body .. '"', 1, true)
    if from then
        return from + 1, to - 1
    end
end

-- Size in bytes of what a body stands for.
local function body_size(body, encoding)
    if type(encoding) ~= 'string' or string.lower(encoding) ~= 'base64' then
        return #body
    end
    local _, padding = string.gsub(string.sub(body, -2), '=', '')
    return math.floor(#body / 4) * 3 - padding
end

-- Returns a text without the body of its message, and the size of that, if the body is above a limit. The smaller limit
-- is for tasks with an eta; the worker fetches the body if the eta has been reached. Otherwise returns the text, and 0.
-- Returns nothing if the rest of the text is too large, too. `value` is what the text stands for: the message, or its entry.
local function shorten(text, value, message, max_body, max_waiting)
    if #text <= max_body and #text <= max_waiting then
        return text, 0
    end
    local body, size = message.body, 0
    if type(body) == 'string' then
        size = body_size(body, message.properties.body_encoding)
    end
    local has_eta = type(message.headers) == 'table' and type(message.headers.eta) == 'string'
    local rest, omitted = text, 0
    if size > max_body or size > max_waiting and has_eta then
        omitted = size
        local from, to = body_range(text, body)
        if from then
            rest = string.sub(text, 1, from - 1) .. string.sub(text, to + 1)
        else
            message.body = ''
            local is_written, written = pcall(cjson.encode, value)
            rest = is_written and written or text
        end
    end
    local kept = omitted == 0 and size > 0 and #body or 0
    if #rest - kept <= max_body then
        return rest, omitted
    end
end
