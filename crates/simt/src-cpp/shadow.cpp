#include "shadow.hpp"

#include "lane.hpp"
#include "mapping.hpp"

#include <algorithm>
#include <bit>

namespace simt {

namespace {

// A write: time | lane (10 bits) | flags (4 bits).
constexpr uint64_t PENDING = 1;   // asynchronous, not delivered
constexpr uint64_t ATOMIC = 2;
constexpr uint64_t CONTENDED = 4; // by several lanes, atomically
constexpr uint64_t BULK = 8;      // through the asynchronous proxy
constexpr uint64_t write_time(uint64_t cell) { return cell >> 14; }
constexpr uint32_t write_lane(uint64_t cell) { return cell >> 4 & 1023; }
constexpr uint64_t write_cell(uint64_t time, uint32_t lane, uint64_t flags) { return time << 14 | lane << 4 | flags; }

// A read: time | warp (5 bits) | flags (3 bits).
constexpr uint64_t SEVERAL_WARPS = 1; // in this interval
constexpr uint64_t OTHER_BLOCKS = 2;  // in this launch
constexpr uint64_t NUMBERED = 4;      // the mask is a number of `readers_`
constexpr uint64_t read_time(uint64_t cell) { return cell >> 8; }
constexpr uint32_t read_warp(uint64_t cell) { return cell >> 3 & 31; }
constexpr uint64_t read_cell(uint64_t time, uint32_t warp, uint64_t flags) { return time << 8 | warp << 3 | flags; }

constexpr size_t CELL_BYTES = 2 * sizeof(uint64_t) + 3 * sizeof(uint32_t) + 1;

// Whether a lane of the same warp synchronised with `by` after `time`.
bool synchronised(const Observer &by, uint32_t lane_in_warp, uint64_t time) {
    return time < std::max(by.warp_sync, by.lane->known[lane_in_warp]);
}

// Whether what `lane` did at `time` is ordered before what `by` does now.
bool before(uint64_t time, uint32_t lane, const Observer &by, bool own_counts) {
    if (time < by.floor) {
        return true;
    }
    if (time < by.block_start) {
        return false;
    }
    if (time < by.barrier || (own_counts && lane == by.lane->index)) {
        return true;
    }
    if (lane / 32 == by.lane->index / 32 && synchronised(by, lane % 32, time)) {
        return true;
    }
    return by.clocks && time < by.lane->seen[lane];
}

// Whether the asynchronous proxy misses the ordinary write that `cell` holds.
bool unfenced(uint64_t cell, const Observer &by) {
    return by.proxy && !(cell & BULK) && write_time(cell) >= by.block_start &&
           by.lanes[write_lane(cell)].proxy_fence <= write_time(cell);
}

} // namespace

Shadow::Shadow(size_t bytes) : bytes_(bytes), base_(map_bytes(std::max<size_t>(bytes, 1) * CELL_BYTES)) {
    writes_ = reinterpret_cast<uint64_t *>(base_);
    reads_ = writes_ + bytes;
    masks_ = reinterpret_cast<uint32_t *>(reads_ + bytes);
    write_places_ = masks_ + bytes;
    read_places_ = write_places_ + bytes;
    being_read_ = reinterpret_cast<uint8_t *>(read_places_ + bytes);
}

Shadow::~Shadow() { unmap_bytes(base_, std::max<size_t>(bytes_, 1) * CELL_BYTES); }

void Shadow::set_written(size_t at, size_t bytes) { std::fill_n(writes_ + at, bytes, write_cell(1, 0, 0)); }

bool Shadow::written_since(size_t at, size_t bytes, uint64_t time) const {
    return std::any_of(writes_ + at, writes_ + at + bytes, [=](uint64_t cell) { return write_time(cell) >= time; });
}

Conflict Shadow::read(size_t at, size_t bytes, const Observer &by, bool collective, bool all_written) {
    const uint32_t warp = by.lane->index / 32;
    const uint32_t bit = 1u << by.lane->index % 32;
    // Neighbouring bytes mostly share their history: what held for the last holds for the next.
    uint64_t checked = 0;
    uint64_t seen = 0, seen_next = 0;
    uint32_t seen_mask = 0, next_mask = 0;
    for (size_t i = at; i < at + bytes; ++i) {
        const uint64_t cell = writes_[i];
        if (cell != checked || cell == 0) {
            if (cell == 0 || (by.shared && write_time(cell) < by.floor)) {
                if (!all_written) {
                    continue;
                }
                return {Trouble::Uninitialised, i};
            }
            const Conflict other{Trouble::AfterWrite, i, write_time(cell), write_lane(cell), write_places_[i]};
            if (cell & PENDING) {
                return {Trouble::Pending, i, other.time, other.lane, other.place};
            }
            if (!before(write_time(cell), write_lane(cell), by, (!collective || by.proxy) && !(cell & CONTENDED))) {
                return other;
            }
            if (unfenced(cell, by)) {
                return {Trouble::Proxy, i, other.time, other.lane, other.place};
            }
            checked = cell;
        }
        const uint64_t old = reads_[i];
        const uint32_t old_mask = masks_[i];
        if (i == at || old != seen || old_mask != seen_mask) {
            seen = old;
            seen_mask = old_mask;
            const uint64_t time = read_time(old);
            seen_next = read_cell(by.lane->clock, warp, old & OTHER_BLOCKS);
            next_mask = bit;
            if (time < by.floor) {
                seen_next &= ~OTHER_BLOCKS;
            } else if (time < by.block_start) {
                seen_next |= OTHER_BLOCKS;
            } else if (time >= by.barrier && by.clocks && !(old & SEVERAL_WARPS) &&
                       (read_warp(old) != warp || old & NUMBERED)) {
                seen_next |= NUMBERED;
                next_mask = add_reader(old, old_mask, by);
            } else if (time >= by.barrier && read_warp(old) != warp) {
                seen_next = old | SEVERAL_WARPS;
                next_mask = old_mask;
            } else if (time >= by.barrier) {
                seen_next |= old & SEVERAL_WARPS;
                for (uint32_t rest = old_mask; rest != 0; rest &= rest - 1) {
                    const uint32_t lane = std::countr_zero(rest);
                    if (!synchronised(by, lane, time) && !(by.clocks && time < by.lane->seen[warp * 32 + lane])) {
                        next_mask |= 1u << lane;
                    }
                }
            }
        }
        reads_[i] = seen_next;
        masks_[i] = next_mask;
        read_places_[i] = by.place;
    }
    return {};
}

size_t Shadow::Hash::operator()(const std::array<uint64_t, 4> &words) const {
    uint64_t hash = 0;
    for (uint64_t word : words) {
        hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
    }
    return hash;
}

size_t Shadow::Hash::operator()(const Readers &readers) const {
    uint64_t hash = readers.size();
    for (const Reader &reader : readers) {
        hash = (*this)({hash, reader.time, reader.warp, reader.mask});
    }
    return hash;
}

uint32_t Shadow::add_reader(uint64_t cell, uint32_t mask, const Observer &by) {
    if (readers_start_ != by.block_start) {
        readers_.clear();
        numbers_.clear();
        added_.clear();
        readers_start_ = by.block_start;
    }
    const std::array<uint64_t, 4> asked{cell, mask, uint64_t{by.lane->index} << 48 | by.lane->acquired, by.lane->clock};
    if (const auto known = added_.find(asked); known != added_.end()) {
        return known->second;
    }
    // Who is ordered before this reader is ordered before all that wait for it.
    const Reader alone{read_time(cell), read_warp(cell), mask};
    const Reader *first = &alone, *last = first + 1;
    if (cell & NUMBERED) {
        first = readers_[mask].data();
        last = first + readers_[mask].size();
    }
    const Reader mine{by.lane->clock, by.lane->index / 32, 1u << by.lane->index % 32};
    bool placed = false;
    now_.clear();
    for (; first != last; ++first) {
        Reader reader = *first;
        for (uint32_t rest = reader.mask; rest != 0; rest &= rest - 1) {
            const uint32_t lane = std::countr_zero(rest);
            if (before(reader.time, reader.warp * 32 + lane, by, true)) {
                reader.mask &= ~(1u << lane);
            }
        }
        if (!placed && reader.warp >= mine.warp) {
            placed = true;
            now_.push_back(mine);
            // Lanes that keep step are one reader.
            if (reader.warp == mine.warp && reader.time == mine.time) {
                now_.back().mask |= reader.mask;
                continue;
            }
        }
        if (reader.mask != 0) {
            now_.push_back(reader);
        }
    }
    if (!placed) {
        now_.push_back(mine);
    }
    const auto [found, fresh] = numbers_.try_emplace(now_, static_cast<uint32_t>(readers_.size()));
    if (fresh) {
        readers_.push_back(now_);
    }
    added_.emplace(asked, found->second);
    return found->second;
}

Conflict Shadow::check_write(size_t at, const Observer &by, bool atomic) const {
    const uint64_t cell = writes_[at];
    const uint64_t time = write_time(cell);
    if (time < by.floor) {
        return {};
    }
    const Conflict other{Trouble::AfterWrite, at, time, write_lane(cell), write_places_[at]};
    if (cell & PENDING) {
        return {Trouble::AfterAsync, at, time, other.lane, other.place};
    }
    if (unfenced(cell, by)) {
        return {Trouble::Proxy, at, time, other.lane, other.place};
    }
    if ((atomic && cell & ATOMIC) || before(time, other.lane, by, !(cell & CONTENDED))) {
        return {};
    }
    return other;
}

Conflict Shadow::check_readers(size_t at, const Observer &by) const {
    if (being_read_[at] != 0) {
        return {Trouble::BeingRead, at, 0, ~0u, read_places_[at]};
    }
    const uint64_t cell = reads_[at];
    const uint64_t time = read_time(cell);
    if (time < by.floor) {
        return {};
    }
    const uint32_t warp = read_warp(cell);
    uint32_t mask = masks_[at];
    if (cell & NUMBERED && time >= by.barrier && time >= by.block_start && !(cell & OTHER_BLOCKS)) {
        for (const Reader &reader : readers_[mask]) {
            for (uint32_t rest = reader.mask; rest != 0; rest &= rest - 1) {
                const uint32_t lane = reader.warp * 32 + std::countr_zero(rest);
                if (!before(reader.time, lane, by, true)) {
                    return {Trouble::AfterRead, at, reader.time, lane, read_places_[at]};
                }
            }
        }
        return {};
    }
    const uint32_t lane = mask == 0 ? ~0u : warp * 32 + std::countr_zero(mask);
    const Conflict other{Trouble::AfterRead, at, time, lane, read_places_[at]};
    if (cell & OTHER_BLOCKS || time < by.block_start) {
        return {Trouble::AfterRead, at, time, time < by.block_start ? lane : ~0u, other.place};
    }
    if (time < by.barrier) {
        return {};
    }
    if (cell & SEVERAL_WARPS) {
        return {Trouble::AfterRead, at, time, ~0u, other.place};
    }
    for (; mask != 0; mask &= mask - 1) {
        const uint32_t reader = std::countr_zero(mask);
        if (!before(time, warp * 32 + reader, by, true)) {
            return {Trouble::AfterRead, at, time, warp * 32 + reader, other.place};
        }
    }
    return {};
}

Conflict Shadow::change(size_t at, size_t bytes, const Observer &by, uint64_t flags) {
    const uint64_t mine = write_cell(by.lane->clock, by.lane->index, flags);
    for (size_t i = at; i < at + bytes; ++i) {
        const uint64_t old = writes_[i];
        const bool checked = i > at && write_time(old) < by.floor && reads_[i] == 0 && being_read_[i] == 0;
        uint64_t next = mine;
        if (!checked) {
            if (Conflict found = check_write(i, by, flags & ATOMIC); found.trouble != Trouble::None) {
                return found;
            }
            if (Conflict found = check_readers(i, by); found.trouble != Trouble::None) {
                return found;
            }
            if (flags & ATOMIC && old & ATOMIC && !before(write_time(old), write_lane(old), by, !(old & CONTENDED))) {
                next |= CONTENDED;
            }
        }
        writes_[i] = next;
        reads_[i] = 0;
        masks_[i] = 0;
        write_places_[i] = by.place;
    }
    return {};
}

Conflict Shadow::write(size_t at, size_t bytes, const Observer &by) { return change(at, bytes, by, 0); }

Conflict Shadow::atomic(size_t at, size_t bytes, const Observer &by) {
    for (size_t i = at; i < at + bytes; ++i) {
        if (writes_[i] == 0 || (by.shared && write_time(writes_[i]) < by.floor)) {
            return {Trouble::Uninitialised, i};
        }
    }
    return change(at, bytes, by, ATOMIC);
}

Conflict Shadow::issue(size_t at, size_t bytes, const Observer &by) {
    return change(at, bytes, by, by.proxy ? PENDING | BULK : PENDING);
}

void Shadow::deliver_bulk(size_t at, size_t bytes, uint32_t lane, uint64_t time, bool valid) {
    std::fill_n(writes_ + at, bytes, valid ? write_cell(time, lane, BULK) : 0);
}

void Shadow::begin_read(size_t at, size_t bytes) {
    std::for_each(being_read_ + at, being_read_ + at + bytes, [](uint8_t &count) { ++count; });
}

void Shadow::forget_reads() { std::fill_n(being_read_, bytes_, uint8_t{0}); }

void Shadow::end_read(size_t at, size_t bytes) {
    std::for_each(being_read_ + at, being_read_ + at + bytes, [](uint8_t &count) { --count; });
}

void Shadow::deliver(size_t at, size_t bytes, const Observer &by) {
    // The write happens anywhere between the issue and the wait, so for others it happens now.
    std::fill_n(writes_ + at, bytes, write_cell(by.lane->clock, by.lane->index, 0));
}

} // namespace simt
