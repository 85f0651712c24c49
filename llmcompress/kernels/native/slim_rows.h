/* Rows of blocks times tokens, for one kind of instructions: NAME, TARGET and DOTS (whether there are those of AVX-VNNI).

   Sums are exact: of bytes in 16 bits, 4 * 2 * 15 * 128 < 2**15, then in 32; of words 16 * 255 * 32639 and 8 * 8191 * 32639 < 2**31. */

#define PART TARGET static inline __attribute__((always_inline))

/* Words of four codes of 3 bits, from bit 4 on: those of half a block, 24 bytes. */
PART __m256i NAME(fours)(const uint8_t *from) {
    const __m256i spread = _mm256_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11,
                                            4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12, 13, 14, 14, 15);
    __m256i dense = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)from)),
                                            _mm_loadu_si128((const __m128i *)(from + 8)), 1);
    return _mm256_mullo_epi16(_mm256_shuffle_epi8(dense, spread), _mm256_set1_epi32(0x00010010));
}

/* Codes of one block as bytes, less than 2**bits; those of 8 bits as they are, those of 3 bits as words unless `looked_up`. */
PART Four NAME(codes)(const uint8_t *from, int bits, int looked_up) {
    Four to;
    UNROLL
    for (int i = 0; i < 4; i++) {
        const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
        if (bits == 8) {
            to.v[i] = load256(from + 32 * i);
        } else if (bits == 4) {
            __m256i both = load256(from + 32 * (i / 2));
            to.v[i] = _mm256_and_si256(i & 1 ? _mm256_srli_epi16(both, 4) : both, mask);
        } else if (bits == 2) {
            __m256i all = load256(from);
            to.v[i] = _mm256_and_si256(i ? _mm256_srli_epi16(all, 2 * i) : all, mask);
        } else if (!looked_up) {
            to.v[i] = NAME(fours)(from + 24 * (i & 1));
        } else {
            const __m256i low = _mm256_set1_epi16(0x0007), high = _mm256_set1_epi16(0x0700);
            __m256i all = NAME(fours)(from + 24 * (i / 2));
            to.v[i] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(all, i & 1 ? 7 : 4), low),
                                      _mm256_and_si256(_mm256_srli_epi16(all, i & 1 ? 5 : 2), high));
        }
    }
    return to;
}

/* Whether integers of so many bits are multiplied as words. */
PART int NAME(in_words)(int bits) { return bits == 3 || (bits == 8 && !DOTS); }

/* `sum`, and the products of pairs of words. */
PART __m256i NAME(dot)(__m256i sum, __m256i left, __m256i right) {
#if DOTS
    return _mm256_dpwssd_avx_epi32(sum, left, right);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(left, right));
#endif
}

/* Sums of products of bytes with one token. */
PART void NAME(byte_parts)(const Four *codes, const int8_t *packet, int parts, __m256i to[SLIM_PARTS]) {
    __m256i upper[2], lower[2];
#if DOTS
    int of = 4 / parts;
    UNROLL
    for (int i = 0; i < 4; i++) {
        int p = i / of & 1;
        if (i % of == 0) upper[p] = lower[p] = _mm256_setzero_si256();
        upper[p] = _mm256_dpbusd_avx_epi32(upper[p], codes->v[i], load256(packet + 64 * i));
        lower[p] = _mm256_dpbusd_avx_epi32(lower[p], codes->v[i], load256(packet + 64 * i + HALF));
        if (i % of == of - 1) to[i / of] = _mm256_add_epi32(_mm256_slli_epi32(upper[p], 8), lower[p]);
    }
#else
    const __m256i by = _mm256_set1_epi16(256), one = _mm256_set1_epi16(1);
    UNROLL
    for (int h = 0; h < 2; h++) {
        const int8_t *from = packet + 128 * h;
        upper[h] = _mm256_add_epi16(_mm256_maddubs_epi16(codes->v[2 * h], load256(from)),
                                    _mm256_maddubs_epi16(codes->v[2 * h + 1], load256(from + 64)));
        lower[h] = _mm256_add_epi16(_mm256_maddubs_epi16(codes->v[2 * h], load256(from + 32)),
                                    _mm256_maddubs_epi16(codes->v[2 * h + 1], load256(from + 96)));
    }
    if (parts == 1) upper[0] = _mm256_add_epi16(upper[0], upper[1]), lower[0] = _mm256_add_epi16(lower[0], lower[1]);
    UNROLL
    for (int p = 0; p < parts; p++) to[p] = _mm256_add_epi32(_mm256_madd_epi16(upper[p], by), _mm256_madd_epi16(lower[p], one));
#endif
}

/* Sums of products of words with some tokens: codes of 8 bits, or what codes stand for in a table of which `tables` has the lower
   and the upper bytes. */
PART void NAME(word_parts)(const Four *codes, const __m256i tables[2], const int8_t *packet, int64_t step, Form is,
                           __m256i to[4][SLIM_PARTS]) {
    const __m256i mask = _mm256_set1_epi16(255);
    int of = 4 / is.parts;
    UNROLL
    for (int i = 0; i < 4; i++) {
        __m256i first, second;
        if (is.table) {
            __m256i low = _mm256_shuffle_epi8(tables[0], codes->v[i]), high = _mm256_shuffle_epi8(tables[1], codes->v[i]);
            first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
        } else {
            first = _mm256_and_si256(codes->v[i], mask), second = _mm256_srli_epi16(codes->v[i], 8);
        }
        UNROLL
        for (int t = 0; t < is.count; t++) {
            __m256i all = i % of ? to[t][i / of] : _mm256_setzero_si256();
            all = NAME(dot)(all, first, load256(packet + t * step + 64 * i));
            to[t][i / of] = NAME(dot)(all, second, load256(packet + t * step + 64 * i + HALF));
        }
    }
}

/* The same of words of four codes of 3 bits, where they lie in their words: sums of what lies highest are moved down until they
   meet the others, which is exact, 4 * 7168 * 32639 < 2**31. */
PART void NAME(four_parts)(const Four *codes, const int8_t *packet, int64_t step, Form is, __m256i to[4][SLIM_PARTS]) {
    static const int field[] = {2, 1, 0, 3}, mask[] = {0x1c00, 0x0380, 0x0070}, down[] = {0, 3, 3, 4};
    UNROLL
    for (int k = 0; k < 4; k++) {
        __m256i some[2];
        UNROLL
        for (int h = 0; h < 2; h++)
            some[h] = k == 3 ? _mm256_srli_epi16(codes->v[h], 13) : _mm256_and_si256(codes->v[h], _mm256_set1_epi16((short)mask[k]));
        UNROLL
        for (int t = 0; t < is.count; t++)
            UNROLL
            for (int h = 0; h < 2; h++) {
                int p = is.parts == 2 ? h : 0, first = h == 0 || is.parts == 2;
                __m256i input = load256(packet + t * step + 128 * h + HALF * field[k]);
                __m256i before = k == 0 && first ? _mm256_setzero_si256() : first ? _mm256_srai_epi32(to[t][p], down[k]) : to[t][p];
                to[t][p] = NAME(dot)(before, some[h], input);
            }
    }
}

/* One block of one row times some tokens, added to `sum`; scales and zero-points of the block begin at `place`. */
PART void NAME(block)(const Inputs *x, const SlimRow *row, const uint8_t *from, int64_t input, int64_t place, Form is, __m256 sum[4]) {
    __m256i part[4][SLIM_PARTS];
    const int8_t *packet = x->packets + input * SLIM_PACKET;
    int64_t blocks = row->blocks, step = blocks * SLIM_PACKET;
    Four codes = NAME(codes)(from, is.bits, is.table);
    if (is.words && is.bits == 3 && !is.table) NAME(four_parts)(&codes, packet, step, is, part);
    else if (is.words) NAME(word_parts)(&codes, row->tables, packet, step, is, part);
    UNROLL
    for (int t = 0; t < is.count; t++) {
        const __m256i *middle = (const __m256i *)(packet + t * step + 256);
        __m256 of_input = _mm256_broadcast_ss(x->scale + input + t * blocks);
        if (!is.words) NAME(byte_parts)(&codes, packet + t * step, is.parts, part[t]);
        UNROLL
        for (int p = 0; p < is.parts; p++) {
            __m256 value = _mm256_cvtepi32_ps(is.table ? part[t][p] : _mm256_sub_epi32(part[t][p], middle[p]));
            if (is.zeros) {
                __m256 sums = _mm256_loadu_ps(x->sums + (input + t * blocks) * SLIM_SUMS + 8 * p);
                value = _mm256_fnmadd_ps(of_part(row, row->zero + place, p, is.parts), sums, value);
            }
            __m256 scale = _mm256_mul_ps(of_input, of_part(row, row->scale + place, p, is.parts));
            sum[t] = _mm256_fmadd_ps(value, scale, sum[t]);
        }
    }
}

/* Four rows times some tokens, one row after the other, so that memory is read in one straight line. */
PART void NAME(tokens)(const Job *job, const Quad *quad, const Inputs *x, int64_t token, Form is) {
    int64_t size = LANES * is.bits, full = job->columns / BLOCK, blocks = (job->columns + BLOCK - 1) / BLOCK;
    for (int r = 0; r < ROWS; r++) {
        SlimRow row = slim_row(quad, r, blocks, is);
        const uint8_t *codes = quad->codes[r];
        int64_t block = 0;
        Walk walk = {0};
        __m256 sum[4];
        UNROLL
        for (int t = 0; t < is.count; t++) sum[t] = _mm256_setzero_ps();
        for (; block < full; block++, codes += size, next_block(quad, &walk)) {
            _mm_prefetch((const char *)(codes + AHEAD), _MM_HINT_NTA);
            if (is.bits == 8) _mm_prefetch((const char *)(codes + AHEAD + 64), _MM_HINT_NTA);
            NAME(block)(x, &row, codes, token * blocks + block, walk.place, is, sum);
        }
        if (block < blocks) {
            uint8_t tail[BLOCK];
            codes = whole_block(codes, is.bits, job->stride - full * size, tail);
            NAME(block)(x, &row, codes, token * blocks + block, walk.place, is, sum);
        }
        UNROLL
        for (int t = 0; t < is.count; t++)
            write_as(job->out, job->dtype, (token + t) * job->rows + quad->row[r], sum_of(sum[t]) * quad->step[r]);
    }
}

PART void NAME(all)(const Job *job, const Quad *quad, const Inputs *x, int64_t token, Form is) {
    int64_t left = job->tokens - token;
    if (left >= 4) is.count = 4, NAME(tokens)(job, quad, x, token, is);
    else if (left >= 2) is.count = 2, NAME(tokens)(job, quad, x, token, is);
    if (left == 1 || left == 3) is.count = 1, NAME(tokens)(job, quad, x, job->tokens - 1, is);
}

/* What the middle code makes of a packet of inputs, and the sums of its lanes: products with ones. */
PART void NAME(sums)(int8_t *packet, float *sums, Form is) {
    __m256i one = is.bits == 3 ? _mm256_set1_epi16(0x2490) : _mm256_set1_epi8(1), part[4][SLIM_PARTS];
    Four ones = {{one, one, one, one}};
    if (is.bits == 3) NAME(four_parts)(&ones, packet, 0, is, part);
    else if (is.words) NAME(word_parts)(&ones, &ones.v[0], packet, 0, is, part);
    else NAME(byte_parts)(&ones, packet, is.parts, part[0]);
    UNROLL
    for (int p = 0; p < is.parts; p++) {
        store256(packet + 256 + 32 * p, _mm256_sll_epi32(part[0][p], _mm_cvtsi32_si128(is.bits - 1)));
        _mm256_storeu_ps(sums + 8 * p, _mm256_cvtepi32_ps(part[0][p]));
    }
}

/* One block of inputs as a packet. */
TARGET static void NAME(inputs)(const Job *job, const Inputs *x, int64_t token, int64_t block) {
    int64_t input = token * ((job->columns + BLOCK - 1) / BLOCK) + block;
    int table = job->format >= TABLE, words = table || NAME(in_words)((int)job->bits), parts = slim_parts(job), bits = (int)job->bits;
    int16_t all[BLOCK];
    int8_t *to = x->packets + input * SLIM_PACKET;
    float *sums = x->sums + input * SLIM_SUMS;
    Four upper, lower;
    x->scale[input] = rounded_words(job, token, block, all);
    bytes_of(all, !words, &upper, &lower);
    if (!table || bits != 8) upper = in_order(&upper, bits), lower = in_order(&lower, bits);
    if (words && !table && bits == 3) fourths_of(all, to);
    else if (words && !table) pairs_of(all, to);
    for (int i = 0; i < 4 && (table || !words); i++) {
        int8_t *at = to + 64 * (job->format == TABLE ? i ^ 1 : i);  /* the first code of a pair lies in the upper half */
        if (table) {
            store256(at, _mm256_unpacklo_epi8(lower.v[i], upper.v[i]));
            store256(at + HALF, _mm256_unpackhi_epi8(lower.v[i], upper.v[i]));
        } else {
            store256(at, upper.v[i]);
            store256(at + HALF, lower.v[i]);
        }
    }
    if (table) return;
    if (bits == 3) NAME(sums)(to, sums, parts == 1 ? (Form){3, 0, 1, 0, 1, 1} : (Form){3, 0, 1, 0, 2, 1});
    else if (words) NAME(sums)(to, sums, parts == 1 ? (Form){8, 0, 1, 0, 1, 1} : (Form){8, 0, 1, 0, 4, 1});
    else if (parts == 1) NAME(sums)(to, sums, (Form){bits, 0, 0, 0, 1, 1});
    else if (parts == 2) NAME(sums)(to, sums, (Form){bits, 0, 0, 0, 2, 1});
    else if (DOTS) NAME(sums)(to, sums, (Form){bits, 0, 0, 0, 4, 1});
}

#define SLIM_CASE(name, bits, table, parts, zeros)                                                        \
    TARGET static void NAME(name)(const Job *job, const Quad *quad, const Inputs *x, int64_t token) {     \
        NAME(all)(job, quad, x, token, (Form){bits, table, table || NAME(in_words)(bits), zeros, parts, 0}); \
    }
SLIM_CASE(slim_2, 2, 0, 1, 0)
SLIM_CASE(slim_3, 3, 0, 1, 0)
SLIM_CASE(slim_4, 4, 0, 1, 0)
SLIM_CASE(slim_8, 8, 0, 1, 0)
SLIM_CASE(slim_3_apart, 3, 0, 2, 0)
SLIM_CASE(slim_4_apart, 4, 0, 2, 0)
SLIM_CASE(slim_8_apart, 8, 0, 4, 0)
SLIM_CASE(slim_2_zeros, 2, 0, 1, 1)
SLIM_CASE(slim_3_zeros, 3, 0, 1, 1)
SLIM_CASE(slim_4_zeros, 4, 0, 1, 1)
SLIM_CASE(slim_8_zeros, 8, 0, 1, 1)
SLIM_CASE(slim_3_zeros_apart, 3, 0, 2, 1)
SLIM_CASE(slim_4_zeros_apart, 4, 0, 2, 1)
SLIM_CASE(slim_8_zeros_apart, 8, 0, 4, 1)
SLIM_CASE(slim_2_table, 2, 1, 2, 0)
SLIM_CASE(slim_3_table, 3, 1, 2, 0)
SLIM_CASE(slim_4_table, 4, 1, 2, 0)

static Kernel NAME(kernel)(const Job *job) {
    static const Kernel plain[2][2][4] = {
        {{NAME(slim_2), NAME(slim_3), NAME(slim_4), NAME(slim_8)},
         {NAME(slim_2), NAME(slim_3_apart), NAME(slim_4_apart), NAME(slim_8_apart)}},
        {{NAME(slim_2_zeros), NAME(slim_3_zeros), NAME(slim_4_zeros), NAME(slim_8_zeros)},
         {NAME(slim_2_zeros), NAME(slim_3_zeros_apart), NAME(slim_4_zeros_apart), NAME(slim_8_zeros_apart)}}};
    static const Kernel table[] = {NAME(slim_2_table), NAME(slim_3_table), NAME(slim_4_table)};
    if (job->format >= TABLE) return table[job->bits - 2];
    return plain[job->format == ASYMMETRIC][slim_parts(job) > 1][job->bits == 8 ? 3 : job->bits - 2];
}
#undef SLIM_CASE
#undef PART
