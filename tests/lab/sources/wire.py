"""Protocol Buffers by hand: what is on the wire, by field number."""


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def fields(data):
    all, at = {}, 0
    while at < len(data):
        key, at = varint(data, at)
        value, at = varint(data, at)
        if key & 7 == 2:
            value, at = data[at : at + value], at + value
        all.setdefault(key >> 3, []).append(value)
    return all


def encode(number):
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def message(*pairs):
    out = b""
    for field, value in pairs:
        if isinstance(value, int):
            out += encode(field << 3) + encode(value)
        else:
            out += encode(field << 3 | 2) + encode(len(value)) + value
    return out
