// Causal attention over the paged store; what is computed of a page, and in which order pages are merged, is in `page.cuh`.
//
// `prefill` does any step: a block has 64 queries of a tile of rows and walks over their pages, two of which are on their
// way at a time. `decode` does steps in which every sequence has one row, rotates queries and keys and writes the new ones
// itself: a block walks over chunks of four pages, a warp each, and fetches ahead, at first ahead of the wait for the kernel
// before it, since all but the new token has been there since an earlier step. Where several blocks share the chunks of a
// row and head, the last of them merges what they give.
#include "bytes.cuh"
#include "ring.cuh"

struct AttentionArgs {
    const u16* qkv;         // (rows, (heads + 2 kv_heads) * head_dim)
    u16* y;                 // (rows, heads * head_dim)
    const u64* store;       // addresses of the layer's keys and values
    const u32* positions;   // (rows)
    const u32* page_bases;  // (rows)
    const u32* pages;
    const Tile* tiles;
    const float* cos;       // (positions, head_dim / 2)
    const float* sin;
    const u32* places;      // decode: (heads * head_dim), the column of y where each goes, below 2^16; null if they stay in order
    float* partials;        // decode: (rows, heads, chunks, padded) sums, then (rows, heads, chunks, 2) states
    u32* tickets;           // decode: (gridDim.y), zero before and after; used if gridDim.x > 1
    u64 stride, y_stride;
    u32 rows, heads, kv_heads, head_dim;
    u32 window;             // 0 for none
    u32 chunks;             // decode: for which there is room
    u32 kept;               // decode: chunks for whose sums a block has room, 0 if they go to `partials`; then gridDim.x is 1 or a cluster
    u32 stages;             // prefill: pages that shared memory holds, 1 or 2; decode: halves of pages for each warp, 1 to 4
    u32 vectors;            // prefill: heads of qkv are aligned to 16 bytes, those of y to 4
    float scale;            // log2(e) / sqrt(head_dim)
};

// First position that the row at `position` sees.
DEVICE u32 first_seen(u32 window, u32 position) { return window != 0 && position + 1 > window ? position + 1 - window : 0; }

template <class Pages>
DEVICE const u8* keys_of(const AttentionArgs& args, u32 page, u32 kv_head) {
    return (const u8*)args.store[0] + (u64)(page * args.kv_heads + kv_head) * Pages::KEY_BYTES;
}
template <class Pages>
DEVICE const u8* values_of(const AttentionArgs& args, u32 page, u32 kv_head) {
    return (const u8*)args.store[1] + (u64)(page * args.kv_heads + kv_head) * Pages::VALUE_BYTES;
}

template <class Pages>
DEVICE void prefill(const AttentionArgs& args) {
    using Half = typename Pages::Half;
    constexpr u32 P = Pages::P, PAGE_BYTES = Pages::KEY_BYTES + Pages::VALUE_BYTES;
    constexpr u32 WARPS = 4, THREADS = WARPS * 32, ROW = P * 2;
    extern __shared__ __align__(128) u8 shared_memory[];
    const u32 shared = shared_address(shared_memory), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Shared memory: queries, sums of the chunks that are done, one page or two.
    const u32 queries = shared + warp * QUERIES * ROW, done = shared + WARPS * QUERIES * ROW + threadIdx.x * 16;
    const u32 ring = shared + WARPS * QUERIES * ROW + P / 8 * THREADS * 16;
    release_next();
    await_previous();

    const u32 group = args.heads / args.kv_heads, kv_head = blockIdx.y / group, part = blockIdx.y % group;
    const Tile tile = args.tiles[gridDim.x - 1 - blockIdx.x];  // long ones first
    const u32 first_query = part * WARPS * QUERIES, tile_queries = tile.rows * group;
    if (first_query >= tile_queries) return;
    const u32 last_query = min(first_query + WARPS * QUERIES, tile_queries) - 1;
    const u32 block_first = first_seen(args.window, tile.position + first_query / group);
    const u32 block_end = tile.position + last_query / group + 1;
    const u32 first_page = block_first / PAGE_LEN, end_page = (block_end + PAGE_LEN - 1) / PAGE_LEN;
    const u32* table = args.pages + tile.page_base;

    auto stage_of = [&](u32 page) { return ring + (args.stages == 2 ? page % 2 * PAGE_BYTES : 0); };
    auto fetch = [&](u32 page) {
        const u32 to = stage_of(page);
        fetch_pieces(to, keys_of<Pages>(args, table[page], kv_head), Pages::KEY_BYTES, lane, warp, WARPS);
        fetch_pieces(to + Pages::KEY_BYTES, values_of<Pages>(args, table[page], kv_head), Pages::VALUE_BYTES, lane, warp, WARPS);
    };
    fetch(first_page);
    commit_copies();

    const u32 warp_query = first_query + warp * QUERIES;
    auto head_of = [&](u32 query) {
        return args.qkv + (tile.row + query / group) * args.stride + (kv_head * group + query % group) * args.head_dim;
    };
    if (args.vectors) {
        constexpr u32 PIECES = QUERIES * P / 8 / 32;
        uint4 pieces[PIECES];
#pragma unroll
        for (u32 k = 0; k < PIECES; ++k) {
            const u32 i = k * 32 + lane, query = warp_query + i / (P / 8), d = i % (P / 8) * 8;
            pieces[k] = {0, 0, 0, 0};
            if (query < tile_queries && d < args.head_dim) pieces[k] = *(const uint4*)(head_of(query) + d);
        }
#pragma unroll
        for (u32 k = 0; k < PIECES; ++k) store_shared_16(queries + (k * 32 + lane) * 16, pieces[k]);
    } else {
        for (u32 i = lane; i < QUERIES * P; i += 32) {
            const u32 query = warp_query + i / P, d = i % P;
            store_shared_2(queries + i * 2, query < tile_queries && d < args.head_dim ? head_of(query)[d] : (u16)0);
        }
    }
    __syncwarp();
    u32 q[P / 16][4];
    if (P <= 128) load_queries<P>(q, queries, ROW, lane);

    // What each of the lane's two queries sees.
    u32 seen[2], end[2];
    bool there[2];
    for (u32 h = 0; h < 2; ++h) {
        const u32 query = warp_query + lane / 4 + 8 * h, position = tile.position + min(query, tile_queries - 1) / group;
        there[h] = query < tile_queries;
        seen[h] = first_seen(args.window, position), end[h] = position + 1;
    }
    const u32 warp_end = warp_query < tile_queries ? tile.position + (min(warp_query + QUERIES, tile_queries) - 1) / group + 1 : 0;

    float sum[P / 8][4];
    State state = empty_state(), total = empty_state();
#pragma unroll
    for (u32 n = 0; n < P / 8; ++n) {
        for (u32 e = 0; e < 4; ++e) sum[n][e] = 0.0f;
        store_shared_16(done + n * THREADS * 16, {0, 0, 0, 0});
    }
    // Merges the chunk into those that are done.
    auto finish_chunk = [&] {
        float a[2], b[2];
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            merge_factors(total.max[h], state.max[h], a[h], b[h]);
            total.sum[h] = merged(total.sum[h], a[h], state.sum[h], b[h]);
        }
#pragma unroll
        for (u32 n = 0; n < P / 8; ++n) {
            const uint4 raw = load_shared_16(done + n * THREADS * 16);
            const u32 old[4] = {raw.x, raw.y, raw.z, raw.w};
            u32 out[4];
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                out[e] = __float_as_uint(merged(__uint_as_float(old[e]), a[e / 2], sum[n][e], b[e / 2]));
                sum[n][e] = 0.0f;
            }
            store_shared_16(done + n * THREADS * 16, {out[0], out[1], out[2], out[3]});
        }
        state = empty_state();
    };

#pragma unroll 1
    for (u32 page = first_page; page < end_page; ++page) {
        if (args.stages == 2) {
            if (page + 1 < end_page) fetch(page + 1);
            commit_copies();
            wait_for_groups<1>();
        } else {
            if (page > first_page) fetch(page);
            commit_copies();
            wait_for_groups<0>();
        }
        const u32 keys = stage_of(page), values = keys + Pages::KEY_BYTES, start = page * PAGE_LEN;
        if (start + PAGE_LEN > block_end) Pages::clear(keys, lane, warp, WARPS, block_end - start);
        __syncthreads();
        if (start < warp_end) {
            i32 page_first[2], page_end[2];
#pragma unroll
            for (u32 h = 0; h < 2; ++h) page_first[h] = (i32)seen[h] - (i32)start, page_end[h] = (i32)end[h] - (i32)start;
            u32 weights[4][4];
            float unit[2];
            if (P > 128) load_queries<P>(q, queries, ROW, lane);
            const State later = page_weights<Pages>(weights, unit, q, keys, lane, args.scale, page_first, page_end);
            float a[2], b[2];
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                merge_factors(state.max[h], later.max[h], a[h], b[h]);
                state.sum[h] = merged(state.sum[h], a[h], later.sum[h], b[h]);
            }
#pragma unroll
            for (u32 n = 0; n < P / 8; ++n) {
                float part_sum[4];
                page_sum<Pages>(part_sum, weights, values, lane, n);
#pragma unroll
                for (u32 e = 0; e < 4; ++e) sum[n][e] = merged(sum[n][e], a[e / 2], Pages::in_units(part_sum[e], unit[e / 2]), b[e / 2]);
            }
        }
        if (page % CHUNK_PAGES == CHUNK_PAGES - 1 || page + 1 == end_page) finish_chunk();
        __syncthreads();
    }

    const float inverse[2] = {1.0f / total.sum[0], 1.0f / total.sum[1]};
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        if (!there[h]) continue;
        const u32 query = warp_query + lane / 4 + 8 * h;
        u16* to = args.y + (tile.row + query / group) * args.y_stride + (kv_head * group + query % group) * args.head_dim;
#pragma unroll
        for (u32 n = 0; n < P / 8; ++n) {
            const uint4 raw = load_shared_16(done + n * THREADS * 16);
            const float x[2] = {__uint_as_float(h == 0 ? raw.x : raw.z), __uint_as_float(h == 0 ? raw.y : raw.w)};
            const u32 d = 8 * n + lane % 4 * 2;
            if (d >= args.head_dim) continue;
            const u32 pair = pack<Half>(__fmul_rn(x[0], inverse[h]), __fmul_rn(x[1], inverse[h]));
            if (args.vectors) *(u32*)(to + d) = pair;
            else to[d] = (u16)pair, to[d + 1] = (u16)(pair >> 16);
        }
    }
}

template <class Pages>
DEVICE void decode(const AttentionArgs& args) {
    using Half = typename Pages::Half;
    constexpr u32 P = Pages::P, THREADS = CHUNK_PAGES * 32, ROW = P * 2;
    extern __shared__ __align__(128) u8 shared_memory[];
    const u32 shared = shared_address(shared_memory), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 group = args.heads / args.kv_heads, parts = (group + QUERIES - 1) / QUERIES;
    // Shared memory: a ring for each warp; queries; the new key and value; states and sums of each query, those of the pages of
    // a chunk and those of the chunks that are done; barriers; codes and scales of the new key and value.
    const u32 queries = shared + CHUNK_PAGES * args.stages * Ring<Pages>::BYTES, new_key = queries + QUERIES * ROW;
    const u32 new_value = new_key + ROW, states = new_value + ROW, done_states = states + QUERIES * CHUNK_PAGES * 8;
    const u32 sums = done_states + 2 * QUERIES * 8, query_sums = min(group, QUERIES) * P * 4;
    const u32 done_sums = sums + CHUNK_PAGES * query_sums, done_slots = args.kept == 0 ? 1 : args.kept;
    const u32 slot_states = done_sums + done_slots * query_sums;
    const u32 all_barriers = slot_states + args.kept * QUERIES * 8, barriers = all_barriers + warp * args.stages * 8;
    const u32 new_codes = all_barriers + CHUNK_PAGES * args.stages * 8;
    release_next();

    const u32 row = blockIdx.y / (args.kv_heads * parts), part = blockIdx.y % parts, kv_head = blockIdx.y / parts % args.kv_heads;
    const u32 first_head = kv_head * group + part * QUERIES;
    const u32 count = min((u32)QUERIES, (kv_head + 1) * group - first_head);
    const u32 position = args.positions[row];
    const u32* table = args.pages + args.page_bases[row];
    const u32 first = first_seen(args.window, position), first_page = first / PAGE_LEN, last_page = position / PAGE_LEN;
    const u32 first_chunk = first_page / CHUNK_PAGES, last_chunk = last_page / CHUNK_PAGES, chunks = last_chunk - first_chunk + 1;
    const bool alone = gridDim.x == 1, shared_merge = IMAGE_SM90 && !alone && args.kept > 0;
    // Those of chunk 0 wait, so that the grid never ends before the one in front of it.
    if (blockIdx.x >= chunks && !shared_merge) return;

    u8 *stored_keys = (u8*)args.store[0], *stored_values = (u8*)args.store[1];
    auto half_of = [&](bool values, u32 at) {
        return (values ? stored_values : stored_keys) + (u64)(at * args.kv_heads + kv_head) * (values ? Pages::VALUE_BYTES : Pages::KEY_BYTES);
    };
    const u32 newest_place = table[last_page];

    // The warp's pages are every `stride`th one; only the first and the last chunk may lack some.
    const u32 stride = gridDim.x * CHUNK_PAGES;
    u32 page = (first_chunk + blockIdx.x) * CHUNK_PAGES + warp;
    u32 ahead = page < first_page ? page + stride : page;  // the page whose halves are fetched next
    bool values_next = false;
    u32 place = ahead <= last_page ? table[ahead] : 0;
    Ring<Pages> ring(args.stages, shared + warp * args.stages * Ring<Pages>::BYTES, barriers, lane);
    auto fetch = [&] {
        ring.fetch(ahead <= last_page, values_next, half_of(values_next, place));
        if (values_next) {
            ahead += stride;
            if (ahead <= last_page) place = table[ahead];
        }
        values_next = !values_next;
    };
    for (u32 i = 0; i < args.stages; ++i) fetch();

    // A thread has feature d and its partner in every PASS-th query; the first threads the new key too, the next ones the new
    // value. All reads are on their way at once. Features of padding are zero.
    constexpr u32 PAIRS = P / 2, PASS = THREADS / PAIRS, STEPS = QUERIES / PASS;
    const u32 half = args.head_dim / 2, d = threadIdx.x % PAIRS, lead = threadIdx.x / PAIRS;
    const bool real = lead < PASS && d < half, newest_here = (last_chunk - first_chunk) % gridDim.x == blockIdx.x;
    const bool fresh = newest_here && lead < 2;
    const float cosine = real ? args.cos[(u64)position * half + d] : 1.0f, sine = real ? args.sin[(u64)position * half + d] : 0.0f;
    auto column_of = [&](u32 i) { return (first_head + i / P) * args.head_dim + i % P; };
    // Places of the thread's first elements are on their way, too: loads at the end would be waited for.
    constexpr u32 HELD = 4;
    const bool ordered = args.places != nullptr;
    u32 held[HELD] = {};
#pragma unroll
    for (u32 k = 0; k < HELD; ++k) {
        const u32 i = k * THREADS + threadIdx.x;
        if (ordered && i < count * P && i % P < args.head_dim) held[k] = args.places[column_of(i)];
    }
    await_previous();

    const u16* qkv = args.qkv + row * args.stride + d;
    u16 lower[STEPS + 1] = {}, upper[STEPS + 1] = {};
#pragma unroll
    for (u32 k = 0; k < STEPS; ++k) {
        const u32 query = lead + k * PASS;
        const u16* from = qkv + (first_head + query) * args.head_dim;
        if (real && query < count) lower[k] = from[0], upper[k] = from[half];
    }
    if (real && fresh) {
        const u16* from = qkv + (args.heads + lead * args.kv_heads + kv_head) * args.head_dim;
        lower[STEPS] = from[0], upper[STEPS] = from[half];
    }
#pragma unroll
    for (u32 k = 0; k <= STEPS; ++k) {
        const u32 to = k < STEPS ? queries + (lead + k * PASS) * ROW : lead == 0 ? new_key : new_value;
        float a = Half::to_float(lower[k]), b = Half::to_float(upper[k]);
        if (k < STEPS || lead == 0) rotate(a, b, cosine, sine);
        if (lead >= PASS || (k == STEPS && !fresh)) continue;
        if (d < half) {
            store_shared_2(to + d * 2, Half::from_float(a));
            store_shared_2(to + (d + half) * 2, Half::from_float(b));
        } else {
            store_shared_4(to + d * 4, 0);
        }
    }
    __syncthreads();
    u32 q[P / 16][4];
    load_queries<P>(q, queries, ROW, lane);
    // Places take the place of the queries.
    if (ordered) {
        __syncthreads();
#pragma unroll
        for (u32 k = 0; k < HELD; ++k)
            if (k * THREADS + threadIdx.x < count * P) store_shared_2(queries + (k * THREADS + threadIdx.x) * 2, (u16)held[k]);
#pragma unroll 1
        for (u32 i = HELD * THREADS + threadIdx.x; i < count * P; i += THREADS)
            if (i % P < args.head_dim) store_shared_2(queries + i * 2, (u16)args.places[column_of(i)]);
    }

    const u32 slot = position % PAGE_LEN, c = lane / 4;
    // Whoever reads the page meanwhile puts the new key and value in the place of what was read.
    if constexpr (Pages::BYTES) {
        if (newest_here) {
            u8* key = part == 0 ? half_of(false, newest_place) : nullptr;
            Pages::quantize_new(new_key, new_codes, key, half_of(true, newest_place), slot, lane, warp);
            __syncthreads();
        }
    } else if (newest_here && part == 0) {
        u16 *key = (u16*)half_of(false, newest_place), *value = (u16*)half_of(true, newest_place);
        for (u32 i = threadIdx.x; i < P; i += THREADS) {
            key[key_place(slot, i, P)] = (u16)load_shared_2(new_key + i * 2);
            value[value_place(slot, i)] = (u16)load_shared_2(new_value + i * 2);
        }
    }

    const u64 head_rows = (u64)args.rows * args.heads;
    u16* y = args.y + row * args.y_stride;
    auto finish = [&](u32 i, float sum, float total) {
        if (i % P >= args.head_dim) return;
        y[ordered ? load_shared_2(queries + i * 2) : column_of(i)] = Half::from_float(__fmul_rn(sum, 1.0f / total));
    };

#pragma unroll 1
    for (u32 chunk = first_chunk + blockIdx.x; chunk <= last_chunk; chunk += gridDim.x, page += stride) {
        const bool active = page >= first_page && page <= last_page, newest = page == last_page;
        u32 weights[4][4];
        float unit[2];
        State state;
        if (active) {
            const u32 keys = ring.next();
            // The new key, into the pieces of the lanes that have it.
            if constexpr (Pages::BYTES) {
                if (newest) Pages::insert_key(keys, new_codes, slot, lane);
                __syncwarp();
            } else if (newest && lane / 8 == slot / 8 % 4 && c % 2 == slot % 2) {
                const u32 nt = 4 * (slot / 32) + slot % 8 / 2;
#pragma unroll
                for (u32 j = 0; j < P / 32; ++j)
                    store_shared_16(keys + ((nt * (P / 32) + j) * 32 + lane) * 16, load_shared_16(new_key + (32 * j + lane % 4 * 8) * 2));
            }
            const i32 start = page * PAGE_LEN;
            const i32 page_first[2] = {(i32)first - start, (i32)first - start};
            const i32 page_end[2] = {(i32)position + 1 - start, (i32)position + 1 - start};
            state = page_weights<Pages>(weights, unit, q, keys, lane, args.scale, page_first, page_end);
            __syncwarp();
            fetch();
        }
        // Before states and sums of the chunk before are overwritten, all have read them.
        if (chunk > first_chunk + blockIdx.x) __syncthreads();
        if (active) {
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                const u32 at = states + ((c + 8 * h) * CHUNK_PAGES + warp) * 8;
                store_shared_float_if(lane % 4 == 0, at, state.max[h]);
                store_shared_float_if(lane % 4 == 0, at + 4, state.sum[h]);
            }
            const u32 values = ring.next();
            constexpr u32 EIGHTS = 4;
            auto sum_up = [&](auto is_newest, const NewValue& at) {
#pragma unroll
                for (u32 n = 0; n < P / 8; n += EIGHTS) {
                    float sum[EIGHTS][4];
                    page_sums<Pages, EIGHTS, decltype(is_newest)::VALUE>(
                        sum, weights, values, lane, n, at, [&](u32 n) { return load_shared_2(new_value + (8 * n + c) * 2); });
#pragma unroll
                    for (u32 h = 0; h < 2; ++h) {
                        if (c + 8 * h >= count) continue;
#pragma unroll
                        for (u32 k = 0; k < EIGHTS; ++k)
                            store_shared_8(sums + ((warp * count + c + 8 * h) * P + 8 * (n + k) + lane % 4 * 2) * 4,
                                           {__float_as_uint(Pages::in_units(sum[k][2 * h], unit[h])),
                                            __float_as_uint(Pages::in_units(sum[k][2 * h + 1], unit[h]))});
                    }
                }
            };
            if constexpr (Pages::BYTES) {
                if (newest) Pages::insert_value(values, new_codes, slot, lane);
                sum_up(No(), NewValue());
            } else if (newest) {
                sum_up(Yes(), new_value_at(slot, lane));
            } else {
                sum_up(No(), NewValue());
            }
            __syncwarp();
            fetch();
        }
        __syncthreads();

        // The pages of the chunk are merged in order; then, in a block that has all chunks, the chunks.
        const u32 from = max(first_page, chunk * CHUNK_PAGES) % CHUNK_PAGES;
        const u32 to = min(last_page, chunk * CHUNK_PAGES + CHUNK_PAGES - 1) % CHUNK_PAGES;
#pragma unroll 1
        for (u32 i = threadIdx.x; i < count * P; i += THREADS) {
            const u32 query = i / P;
            float max = NEGATIVE_INFINITY, total = 0.0f, sum = 0.0f;
            merge_in_order<CHUNK_PAGES>(
                max, total, sum, to - from + 1,
                [&](u32 k) {
                    const u32 at = states + (query * CHUNK_PAGES + from + k) * 8;
                    return float2{load_shared_float(at), load_shared_float(at + 4)};
                },
                [&](u32 k) { return load_shared_float(sums + ((from + k) * count * P + i) * 4); });
            if (alone) {
                // Every thread of a query needs the state that the chunks before have left, while one writes the next.
                const u32 old = done_states + (chunk % 2 * QUERIES + query) * 8, next = done_states + ((chunk + 1) % 2 * QUERIES + query) * 8;
                float done_max = NEGATIVE_INFINITY, done_total = 0.0f, done_sum = 0.0f;
                if (chunk > first_chunk) {
                    done_max = load_shared_float(old), done_total = load_shared_float(old + 4);
                    done_sum = load_shared_float(done_sums + i * 4);
                }
                float a, b;
                merge_factors(done_max, max, a, b);
                done_total = merged(done_total, a, total, b);
                done_sum = merged(done_sum, a, sum, b);
                if (chunk == last_chunk) {
                    finish(i, done_sum, done_total);
                } else {
                    store_shared_float_if(true, done_sums + i * 4, done_sum);
                    store_shared_float_if(i % P == 0, next, done_max);
                    store_shared_float_if(i % P == 0, next + 4, done_total);
                }
                continue;
            }
            if (shared_merge) {
                const u32 slot = (chunk - first_chunk) / gridDim.x;
                store_shared_float_if(true, done_sums + slot * query_sums + i * 4, sum);
                store_shared_float_if(i % P == 0, slot_states + (slot * QUERIES + query) * 8, max);
                store_shared_float_if(i % P == 0, slot_states + (slot * QUERIES + query) * 8 + 4, total);
                continue;
            }
            const u64 head = ((u64)row * args.heads + first_head + query) * args.chunks + (chunk - first_chunk);
            args.partials[head * P + i % P] = sum;
            if (i % P == 0) {
                float* state = args.partials + head_rows * args.chunks * P + head * 2;
                state[0] = max, state[1] = total;
            }
        }
    }
    if (alone) return;

#if IMAGE_SM90
    if (shared_merge) {
        // Each block of the cluster merges a part of the elements.
        cluster_arrive();
        cluster_wait();
#pragma unroll 1
        for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < count * P; i += gridDim.x * THREADS) {
            float max = NEGATIVE_INFINITY, total = 0.0f, sum = 0.0f;
            constexpr u32 BATCH = 8;
#pragma unroll 1
            for (u32 start = 0; start < chunks; start += BATCH) {
                merge_in_order<BATCH>(
                    max, total, sum, chunks - start,
                    [&](u32 k) {
                        const u32 rank = (start + k) % gridDim.x, at = slot_states + ((start + k) / gridDim.x * QUERIES + i / P) * 8;
                        return float2{load_remote_float(at, rank), load_remote_float(at + 4, rank)};
                    },
                    [&](u32 k) { return load_remote_float(done_sums + (start + k) / gridDim.x * query_sums + i * 4, (start + k) % gridDim.x); });
            }
            finish(i, sum, total);
        }
        // A block's sums are there until all have read them.
        cluster_arrive();
        cluster_wait();
        return;
    }
#endif

    // The block that comes last merges the chunks.
    __shared__ u32 ticket;
    __threadfence();
    __syncthreads();
    u32* tickets = args.tickets + blockIdx.y;
    const u32 blocks = min(chunks, gridDim.x);
    if (threadIdx.x == 0) {
        ticket = atomicAdd(tickets, 1);
        if (ticket == blocks - 1) *tickets = 0;
    }
    __syncthreads();
    if (ticket != blocks - 1) return;
    __threadfence();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < count * P; i += THREADS) {
        const u64 head = ((u64)row * args.heads + first_head + i / P) * args.chunks;
        const float* chunk_sums = args.partials + head * P + i % P;
        const float2* chunk_states = (const float2*)(args.partials + head_rows * args.chunks * P) + head;
        float max = NEGATIVE_INFINITY, total = 0.0f, sum = 0.0f;
        constexpr u32 BATCH = 8;
#pragma unroll 1
        for (u32 start = 0; start < chunks; start += BATCH) {
            merge_in_order<BATCH>(
                max, total, sum, chunks - start, [&](u32 k) { return __ldcg(chunk_states + start + k); },
                [&](u32 k) { return __ldcg(chunk_sums + (u64)(start + k) * P); });
        }
        finish(i, sum, total);
    }
}

// One image holds one type of activations (IMAGE_HALF), one padded head_dim (IMAGE_DIM) and one kind of pages (IMAGE_PAGES), of
// bytes if IMAGE_BYTES is 1, and what IMAGE_PREFILL and IMAGE_DECODE say.
#if IMAGE_PREFILL
extern "C" __global__ void __launch_bounds__(128) attention_prefill(const __grid_constant__ AttentionArgs args) {
    prefill<IMAGE_PAGES<IMAGE_HALF, IMAGE_DIM>>(args);
}
#endif
#if IMAGE_DECODE && IMAGE_DIM <= 128
extern "C" __global__ void __launch_bounds__(128, IMAGE_DIM > 128 ? 1 : 3) attention_decode(const __grid_constant__ AttentionArgs args) {
    decode<IMAGE_PAGES<IMAGE_HALF, IMAGE_DIM>>(args);
}
#endif
#if IMAGE_PREFILL && IMAGE_BYTES
extern "C" __global__ void __launch_bounds__(256) append_bytes(const __grid_constant__ RopeArgs args) {
    store_bytes<IMAGE_PAGES<IMAGE_HALF, IMAGE_DIM>>(args);
}
#endif
