/* A small residual network that C computes, trained with the stack; then everything that can be checked is checked.
 *
 *   h_k(x) = W2 tanh(W1 x + b),  x of D values per row;  loss = 1/2 mean |x_K - target|^2
 *
 * Prints one line per check and returns 0 if all are good. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bdia.h"

enum { D = 4, N = 12, ROWS = 5, K = 8, BATCH = 6, P = ROWS * D, ALL = BATCH * P, PARAMS = 2 * D * N + N };

static int failed = 0;

static void check(int good, const char *what) {
  printf("%s  %s\n", good ? "ok  " : "FAIL", what);
  if (!good) failed = 1;
}

static void expect(bdia_status got, bdia_status wanted, const char *what) {
  check(got == wanted, what);
  if (got != wanted) printf("      status %d, expected %d: %s\n", (int)got, (int)wanted, bdia_last_message());
  if (wanted != BDIA_STATUS_OK) check(strlen(bdia_last_message()) > 8, bdia_last_message());
}

/* A number in -1 ... 1: one step of a 64-bit linear congruential generator. */
static float noise(uint64_t *state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (float)((double)(*state >> 40) / (double)(1 << 23) - 1.0);
}

/* The network: parameters, one gradient buffer for all blocks (used again as blocks are done), and what goes wrong. */
typedef struct {
  float w[K][PARAMS];
  float g[PARAMS];
  double all[K][PARAMS]; /* gradients as they were at `done`, for comparison */
  float lr;
  int done[K];
  int calls;
  int bad_call;    /* this call of residual, counted from 1, adds `bad` to a value */
  float bad;
  int code;        /* residual returns it */
  int wild_block;  /* vjp of this block, counted from 1, adds `wild` to the first value of sample 4 */
  float wild;
  int scribbler;   /* residual of this block, counted from 1, writes into its input, in the last sample of a call */
  bdia_stack *own; /* residual calls functions on it */
} Net;

static int residual(void *user, const bdia_call *c, const float *x, float *h) {
  Net *net = user;
  const float *w1 = net->w[c->block], *b = w1 + D * N, *w2 = b + N;
  float *t = c->frame; /* tanh, kept for vjp */
  net->calls++;
  for (size_t r = 0; r < c->samples * ROWS; r++, x += D, h += D, t += N) {
    for (int j = 0; j < N; j++) {
      float a = b[j];
      for (int i = 0; i < D; i++) a += x[i] * w1[i * N + j];
      t[j] = tanhf(a);
    }
    for (int i = 0; i < D; i++) {
      h[i] = 0;
      for (int j = 0; j < N; j++) h[i] += t[j] * w2[j * D + i];
    }
  }
  if (net->calls == net->bad_call) h[-1] += net->bad;
  if (net->scribbler == (int)c->block + 1) ((float *)(uintptr_t)x)[-1] += 0.001f;
  if (net->own) {
    uint64_t count;
    expect(bdia_stack_mismatches(net->own, &count), BDIA_STATUS_STATE, "a callback may not use its own stack");
    expect(bdia_stack_free(net->own), BDIA_STATUS_STATE, "nor free it");
    net->own = NULL;
  }
  return net->code;
}

static int vjp(void *user, const bdia_call *c, const float *x, float *gh, float *gx) {
  Net *net = user;
  const float *w1 = net->w[c->block], *w2 = w1 + D * N + N;
  float *g1 = net->g, *gb = g1 + D * N, *g2 = gb + N;
  const float *t = c->frame;
  if (net->wild_block == (int)c->block + 1 && c->first <= 4 && 4 < c->first + c->samples) gx[(4 - c->first) * P] += net->wild;
  for (size_t r = 0; r < c->samples * ROWS; r++, x += D, gh += D, gx += D, t += N) {
    for (int j = 0; j < N; j++) {
      float a = 0;
      for (int i = 0; i < D; i++) {
        a += gh[i] * w2[j * D + i];
        g2[j * D + i] += gh[i] * t[j];
      }
      a *= 1 - t[j] * t[j];
      gb[j] += a;
      for (int i = 0; i < D; i++) {
        g1[i * N + j] += a * x[i];
        gx[i] += a * w1[i * N + j];
      }
    }
  }
  return 0;
}

static int done(void *user, size_t block) {
  Net *net = user;
  net->done[block]++;
  for (int i = 0; i < PARAMS; i++) {
    net->all[block][i] = net->g[i];
    net->w[block][i] -= net->lr * net->g[i];
    net->g[i] = 0;
  }
  return 0;
}

static void start(Net *net) {
  uint64_t s = 7;
  memset(net, 0, sizeof *net);
  for (int k = 0; k < K; k++)
    for (int i = 0; i < PARAMS; i++) net->w[k][i] = 0.3f * noise(&s);
}

static void data(float *x, float *target) {
  uint64_t s = 3;
  for (int i = 0; i < ALL; i += D) {
    for (int j = 0; j < D; j++) x[i + j] = noise(&s);
    for (int j = 0; j < D; j++) target[i + j] = x[i + j] * x[i + (j + 1) % D] + 0.5f * x[i + (j + 2) % D];
  }
}

static double loss(const float *x, const float *target, float *g) {
  double sum = 0;
  for (int i = 0; i < ALL; i++) {
    double e = (double)x[i] - target[i];
    g[i] = (float)(e / ALL);
    sum += 0.5 * e * e / ALL;
  }
  return sum;
}

/* The same pass and its gradient in double, everything stored, no grid: parameter gradients, and G_0. */
static void independent(const Net *net, const float *x0, const float *target, double magnitude,
                        const signed char sigma[K][BATCH], double (*grad)[PARAMS], double *g0) {
  static double x[K + 1][ALL], t[K][BATCH * ROWS * N], g[K + 1][ALL];
  memset(g, 0, sizeof g);
  memset(grad, 0, sizeof(double) * K * PARAMS);
  for (int i = 0; i < ALL; i++) x[0][i] = x0[i];
  for (int k = 0; k < K; k++)
    for (int r = 0; r < BATCH * ROWS; r++) {
      double gamma = k ? magnitude * sigma[k][r / ROWS] : 0, *tr = t[k] + r * N, *xr = x[k] + r * D;
      for (int j = 0; j < N; j++) {
        double a = net->w[k][D * N + j];
        for (int i = 0; i < D; i++) a += xr[i] * net->w[k][i * N + j];
        tr[j] = tanh(a);
      }
      for (int i = 0; i < D; i++) {
        double h = 0;
        for (int j = 0; j < N; j++) h += tr[j] * net->w[k][D * N + N + j * D + i];
        x[k + 1][r * D + i] = (k ? gamma * x[k - 1][r * D + i] : 0) + (1 - gamma) * xr[i] + (1 + gamma) * h;
      }
    }
  for (int i = 0; i < ALL; i++) g[K][i] = (x[K][i] - target[i]) / ALL;
  for (int k = K - 1; k >= 0; k--)
    for (int r = 0; r < BATCH * ROWS; r++) {
      double gamma = k ? magnitude * sigma[k][r / ROWS] : 0;
      for (int i = 0; i < D; i++) {
        g[k][r * D + i] += (1 - gamma) * g[k + 1][r * D + i];
        if (k) g[k - 1][r * D + i] += gamma * g[k + 1][r * D + i];
      }
      for (int j = 0; j < N; j++) {
        double a = 0, tj = t[k][r * N + j];
        for (int i = 0; i < D; i++) {
          double gh = (1 + gamma) * g[k + 1][r * D + i];
          a += gh * net->w[k][D * N + N + j * D + i];
          grad[k][D * N + N + j * D + i] += gh * tj;
        }
        a *= 1 - tj * tj;
        grad[k][D * N + j] += a;
        for (int i = 0; i < D; i++) {
          grad[k][i * N + j] += a * x[k][r * D + i];
          g[k][r * D + i] += a * net->w[k][i * N + j];
        }
      }
    }
  memcpy(g0, g[0], sizeof g[0]);
}

static double distance(const double *a, const double *b, int n) {
  double worst = 0, size = 0;
  for (int i = 0; i < n; i++) {
    worst = fmax(worst, fabs(a[i] - b[i]));
    size = fmax(size, fabs(b[i]));
  }
  return worst / size;
}

static bdia_config config(void) {
  bdia_config c;
  expect(bdia_config_default(&c), BDIA_STATUS_OK, "defaults");
  c.batch = BATCH;
  c.per_sample = P;
  c.blocks = K;
  c.chunk = 4; /* an uneven split */
  c.frame = ROWS * N;
  c.threads = 2;
  c.verify = 1;
  return c;
}

static void training(Net *net, bdia_stack *stack, const float *x, const float *target) {
  static float y[ALL], g[ALL];
  double first = 0, last = 0;
  uint64_t count = 1, sum = 0;
  start(net);
  net->lr = 0.4f;
  for (uint32_t step = 0; step < 300; step++) {
    if (bdia_stack_forward(stack, 11, step, 0, x, y)) break;
    last = loss(y, target, g);
    if (step == 0) first = last;
    if (bdia_stack_backward(stack, g, NULL)) break;
    if (bdia_stack_mismatches(stack, &count)) break;
    sum += count;
  }
  printf("      loss %.5f -> %.5f\n", first, last);
  check(last < 0.35 * first, "300 steps bring the loss below a third");
  check(count == 0 && sum == 0, "no activation was rebuilt wrongly, in any bit, in any step");
  check(net->done[0] == 300 && net->done[K - 1] == 300, "every block was done once a step");
}

/* At a step of a configuration, with the gamma that it has there. */
static void gradients_of(bdia_config c, uint32_t step, double magnitude, Net *net, const bdia_blocks *blocks,
                         const float *x, const float *target) {
  static float y[ALL], g[ALL], g0[ALL];
  static double grad[K][PARAMS], there[ALL], here[ALL];
  static signed char sigma[K][BATCH];
  bdia_stack *stack;
  uint64_t count = 1;
  c.frac_bits = 20; /* a finer grid, to be nearer to a network without one */
  start(net);
  expect(bdia_stack_new(&c, blocks, &stack), BDIA_STATUS_OK, "a stack on a finer grid");
  expect(bdia_stack_forward(stack, 5, step, 100, x, y), BDIA_STATUS_OK, "forward");
  loss(y, target, g);
  expect(bdia_stack_backward(stack, g, g0), BDIA_STATUS_OK, "backward");
  expect(bdia_stack_mismatches(stack, &count), BDIA_STATUS_OK, "mismatches");
  check(count == 0, "0 differences");
  int all = 1, plus = 0;
  for (int k = 0; k < K; k++) {
    expect(bdia_signs(5, step, 100, (uint16_t)k, c.sign, (int8_t *)sigma[k], BATCH), BDIA_STATUS_OK, "signs");
    for (int i = 0; i < BATCH; i++) all &= sigma[k][i] == sigma[0][i], plus += sigma[k][i] == 1;
  }
  check(all == (c.sign != 0) && (plus == 0) == (c.sign == -1) && (plus == K * BATCH) == (c.sign == 1), "of that kind");
  independent(net, x, target, magnitude, (const signed char(*)[BATCH])sigma, grad, there);
  for (int i = 0; i < ALL; i++) here[i] = g0[i];
  double params = distance(&net->all[0][0], &grad[0][0], K * PARAMS), input = distance(here, there, ALL);
  printf("      relative distance of gradients from double: parameters %.1e, input %.1e\n", params, input);
  check(params < 1e-4 && input < 1e-4, "gradients are those of plain backpropagation in double");
  expect(bdia_stack_free(stack), BDIA_STATUS_OK, "free");
}

static void gradients(Net *net, const bdia_blocks *blocks, const float *x, const float *target) {
  bdia_config c = config();
  bdia_memory few, many;
  gradients_of(c, 2, 0.5, net, blocks, x, target);
  expect(bdia_plan(&c, &few), BDIA_STATUS_OK, "the plan with one bit");
  /* Four bits from step 2 on, two before. */
  c.gamma = 0.25;
  c.gamma_changes[0].step = 2;
  c.gamma_changes[0].gamma = 0.0625;
  c.gamma_change_count = 1;
  expect(bdia_plan(&c, &many), BDIA_STATUS_OK, "the plan with four");
  check(many.side_bits > few.side_bits, "has more side bits");
  bdia_stack *stack;
  size_t words = 0, per_block = 0;
  expect(bdia_stack_new(&c, blocks, &stack), BDIA_STATUS_OK, "a stack with changes of gamma");
  expect(bdia_stack_side_words(stack, &words), BDIA_STATUS_OK, "its side bits");
  expect(bdia_side_words(0.0625, BATCH, P, &per_block), BDIA_STATUS_OK, "those of four bits");
  check(words == per_block * (K - 1), "there is room for the most bits that a step keeps");
  expect(bdia_stack_free(stack), BDIA_STATUS_OK, "free");
  for (int sign = -1; sign <= 2; sign++) {
    c.sign = sign;
    gradients_of(c, 1, 0.25, net, blocks, x, target);
    gradients_of(c, 2, 0.0625, net, blocks, x, target);
  }
}

/* The stack's bits against a loop of our own over the raw functions. */
static void raw(Net *net, bdia_stack *stack, const float *x0) {
  static float y[ALL], cur[ALL], h[ALL], frame[BATCH * ROWS * N], g[ALL];
  static int32_t x[2][ALL], start_x[ALL], kept[ALL], second[ALL];
  signed char sigma[BATCH];
  size_t per_block, words;
  uint64_t a, b, whole;
  start(net);
  expect(bdia_stack_forward(stack, 1, 9, 0, x0, y), BDIA_STATUS_OK, "forward");
  expect(bdia_side_words(0.5, BATCH, P, &per_block), BDIA_STATUS_OK, "words of a block");
  expect(bdia_stack_side_words(stack, &words), BDIA_STATUS_OK, "words of a stack");
  check(words == per_block * (K - 1) && per_block == BATCH * ((P + 31) / 32), "one bit a value and block but one");
  uint32_t *theirs = malloc(words * 4), *ours = malloc(words * 4);
  if (!theirs || !ours) exit(1);
  expect(bdia_stack_side_bits(stack, theirs, words), BDIA_STATUS_OK, "side bits");
  expect(bdia_stack_side_bits(stack, theirs, words - 1), BDIA_STATUS_SIZE, "side bits of a wrong number");

  bdia_call call = {0};
  call.samples = BATCH;
  call.frame = frame;
  expect(bdia_quantize(14, x0, x[0], ALL), BDIA_STATUS_OK, "quantize");
  memcpy(start_x, x[0], sizeof start_x);
  memcpy(x[1], x[0], sizeof start_x);
  for (int k = 0; k < K; k++) {
    call.block = (size_t)k;
    int bad = bdia_dequantize(14, x[k % 2], cur, ALL) || residual(net, &call, cur, h);
    bad |= (int)bdia_signs(1, 9, 0, (uint16_t)k, 0, sigma, BATCH);
    if (k == 0)
      bad |= (int)bdia_add_quantized(14, x[1], h, ALL);
    else
      bad |= (int)bdia_step(14, 0.5, BATCH, P, sigma, x[(k + 1) % 2], cur, h, ours + (size_t)(k - 1) * per_block);
    if (bad) check(0, "a raw step");
    if (k == 0) memcpy(second, x[1], sizeof second);
  }
  check(!memcmp(theirs, ours, words * 4), "the stack's side bits are those of the raw steps");
  expect(bdia_stack_activation(stack, K, kept, ALL), BDIA_STATUS_OK, "X_K");
  check(!memcmp(kept, x[K % 2], sizeof kept), "and so is X_K");
  expect(bdia_stack_activation(stack, K - 1, kept, ALL), BDIA_STATUS_OK, "X_{K-1}");
  check(!memcmp(kept, x[(K - 1) % 2], sizeof kept), "and X_{K-1}");
  expect(bdia_stack_activation(stack, 0, kept, ALL), BDIA_STATUS_SETTING, "X_0 is not kept");
  expect(bdia_dequantize(14, x[K % 2], cur, ALL), BDIA_STATUS_OK, "dequantize");
  check(!memcmp(cur, y, sizeof y), "x_K is X_K on the grid");

  for (int k = K - 1; k > 0; k--) {
    call.block = (size_t)k;
    int bad = bdia_dequantize(14, x[k % 2], cur, ALL) || residual(net, &call, cur, h) ||
              bdia_signs(1, 9, 0, (uint16_t)k, 0, sigma, BATCH);
    bad |= (int)bdia_inverse(14, 0.5, BATCH, P, sigma, x[(k + 1) % 2], cur, h, ours + (size_t)(k - 1) * per_block);
    if (bad) check(0, "a raw inverse");
  }
  check(!memcmp(x[0], start_x, sizeof start_x) && !memcmp(x[1], second, sizeof second), "raw inverses lead back to X_0 and X_1");
  memset(g, 0, sizeof g);
  expect(bdia_stack_backward(stack, g, g), BDIA_STATUS_OK, "backward");
  expect(bdia_stack_activation(stack, 0, kept, ALL), BDIA_STATUS_OK, "X_0 after it");
  check(!memcmp(kept, start_x, sizeof kept), "is the X_0 before it");
  expect(bdia_stack_activation(stack, 1, kept, ALL), BDIA_STATUS_OK, "X_1 after it");
  check(!memcmp(kept, second, sizeof kept), "is the X_1 before it");
  expect(bdia_checksum(kept, 50, 0, &a), BDIA_STATUS_OK, "checksum");
  expect(bdia_checksum(kept + 50, ALL - 50, 50, &b), BDIA_STATUS_OK, "checksum of the rest");
  expect(bdia_checksum(kept, ALL, 0, &whole), BDIA_STATUS_OK, "checksum of all");
  check(a + b == whole, "checksums add up");
  kept[17] ^= 64;
  expect(bdia_checksum(kept, ALL, 0, &a), BDIA_STATUS_OK, "checksum with a bit turned");
  check(a != whole, "differs");
  free(theirs);
  free(ours);

  /* m = 3, all residues, both signs. */
  {
    enum { S = 2, Q = 70, M = 3 };
    int32_t v[S * Q], v0[S * Q];
    float c[S * Q], f[S * Q], n[S * Q], u[S * Q];
    uint32_t side[S * M * 3];
    signed char both[S] = {1, -1};
    uint64_t s = 9;
    for (int i = 0; i < S * Q; i++) {
      v0[i] = v[i] = i * 1001 - 70000 + i % 8;
      c[i] = noise(&s), f[i] = noise(&s), n[i] = noise(&s), u[i] = noise(&s);
    }
    expect(bdia_step(14, 0.125, S, Q, both, v, c, f, side), BDIA_STATUS_OK, "a step with three bits");
    check(memcmp(v, v0, sizeof v) != 0, "changes x");
    expect(bdia_inverse(14, 0.125, S, Q, both, v, c, f, side), BDIA_STATUS_OK, "its inverse");
    check(!memcmp(v, v0, sizeof v), "brings all back");
    float n0 = n[Q], c0 = c[Q];
    expect(bdia_step_gradient(0.125, S, Q, both, n, c, u), BDIA_STATUS_OK, "its gradient");
    check(n[Q] == -0.125f * n0 && c[Q] == c0 + 1.125f * n0 && u[Q] == 0.875f * n0, "is that of the formula");
  }
}

static void faults(Net *net, const bdia_blocks *blocks, bdia_stack *stack, float *x, const float *target) {
  static float y[ALL], g[ALL];
  bdia_fault fault;
  uint64_t count;
  start(net);
  loss(x, target, g);

  expect(bdia_stack_forward(stack, 1, 0, 0, x, y), BDIA_STATUS_OK, "forward");
  net->lr = 0;
  /* Two chunks a block: calls of the backward pass are 15 and 16 for block 7, 17 and 18 for block 6, 19 ... */
  net->bad_call = net->calls + 5;
  net->bad = 0.01f;
  memset(net->done, 0, sizeof net->done);
  expect(bdia_stack_backward(stack, g, NULL), BDIA_STATUS_CHECKSUM, "a block that does not repeat itself");
  expect(bdia_stack_fault(stack, &fault), BDIA_STATUS_OK, "where");
  check(fault.block == 5, "block 5");
  check(net->done[6] == 1 && net->done[5] == 0 && net->done[4] == 0, "which was not done, nor those below");
  expect(bdia_stack_activation(stack, 0, (int32_t *)y, ALL), BDIA_STATUS_STATE, "no activations after it");
  expect(bdia_stack_backward(stack, g, NULL), BDIA_STATUS_STATE, "backward without forward");

  net->bad_call = net->calls + 6;
  net->bad = (float)NAN;
  expect(bdia_stack_forward(stack, 1, 0, 0, x, y), BDIA_STATUS_RANGE, "a block gives NaN");
  expect(bdia_stack_fault(stack, &fault), BDIA_STATUS_OK, "where");
  check(fault.block == 2 && fault.sample == BATCH - 1 && isnan(fault.value), "block 2, the last sample");
  float keep = x[P];
  x[P] = 1e30f;
  expect(bdia_stack_forward(stack, 1, 0, 0, x, y), BDIA_STATUS_RANGE, "an input outside the grid");
  expect(bdia_stack_fault(stack, &fault), BDIA_STATUS_OK, "where");
  check(fault.block == -1 && fault.sample == 1 && fault.value == (double)1e30f, "the input, sample 1");
  x[P] = keep;

  /* Gradients that are not finite do not reach an optimizer. */
  for (int i = 0; i < 2; i++) {
    float wild[2] = {(float)NAN, -INFINITY};
    start(net);
    expect(bdia_stack_forward(stack, 1, 0, 0, x, y), BDIA_STATUS_OK, "forward");
    net->wild_block = 3 + 1;
    net->wild = wild[i];
    expect(bdia_stack_backward(stack, g, NULL), BDIA_STATUS_GRADIENT, "vjp of block 3 gives a gradient that is not finite");
    expect(bdia_stack_fault(stack, &fault), BDIA_STATUS_OK, "where");
    check(fault.block == 3 && fault.sample == 4 && !isfinite(fault.value), "block 3, sample 4");
    check(net->done[4] == 1 && net->done[3] == 0 && net->done[2] == 0, "which was not done, nor those below");
    float other = g[2 * P];
    start(net);
    expect(bdia_stack_forward(stack, 1, 0, 0, x, y), BDIA_STATUS_OK, "forward");
    g[2 * P] = wild[i];
    expect(bdia_stack_backward(stack, g, NULL), BDIA_STATUS_GRADIENT, "a given gradient that is not finite");
    g[2 * P] = other;
    expect(bdia_stack_fault(stack, &fault), BDIA_STATUS_OK, "where");
    check(fault.block == K && fault.sample == 2 && !isfinite(fault.value), "above all blocks, sample 2");
    check(net->done[K - 1] == 0 && net->done[0] == 0, "no block was done");
  }
  start(net);

  net->scribbler = 2 + 1;
  expect(bdia_stack_forward(stack, 1, 0, 0, x, y), BDIA_STATUS_CHECKSUM, "a block writes into its input");
  net->scribbler = 0;
  expect(bdia_stack_fault(stack, &fault), BDIA_STATUS_OK, "where");
  check(fault.block == 2 && fault.sample == 3, "block 2, the last sample of the first chunk");

  net->code = 3;
  expect(bdia_stack_forward(stack, 1, 0, 0, x, y), BDIA_STATUS_CALLBACK, "a callback gives up");
  net->code = 0;
  net->own = stack;
  expect(bdia_stack_forward(stack, 1, 0, 0, x, y), BDIA_STATUS_OK, "after all that the stack still works");
  expect(bdia_stack_backward(stack, g, NULL), BDIA_STATUS_OK, "both ways");
  expect(bdia_stack_mismatches(stack, &count), BDIA_STATUS_OK, "and exactly");
  check(count == 0, "0 differences");
  (void)blocks;
}

static void refusals(const bdia_blocks *blocks, bdia_stack *stack, const float *x) {
  static float y[ALL];
  static int32_t ints[ALL];
  bdia_stack *none = stack;
  bdia_memory plan;
  bdia_config c = config();
  size_t words;
  signed char sigma[BATCH] = {1, 1, 1, 1, 1, 1};
  uint32_t side[BATCH];

  expect(bdia_config_default(NULL), BDIA_STATUS_POINTER, "NULL config");
  expect(bdia_plan(NULL, &plan), BDIA_STATUS_POINTER, "NULL config");
  expect(bdia_plan(&c, NULL), BDIA_STATUS_POINTER, "NULL memory");
  expect(bdia_stack_new(&c, NULL, &none), BDIA_STATUS_POINTER, "NULL blocks");
  check(none == NULL, "no stack after a failure");
  expect(bdia_stack_new(&c, blocks, NULL), BDIA_STATUS_POINTER, "NULL stack");
  bdia_blocks half = *blocks;
  half.vjp = NULL;
  expect(bdia_stack_new(&c, &half, &none), BDIA_STATUS_POINTER, "NULL callback");
#define REFUSE(field, value, status)                                            \
  do {                                                                          \
    bdia_config bad = c;                                                        \
    bad.field = value;                                                          \
    expect(bdia_stack_new(&bad, blocks, &none), status, #field " = " #value);   \
  } while (0)
  REFUSE(batch, 0, BDIA_STATUS_SETTING);
  REFUSE(blocks, 0, BDIA_STATUS_SETTING);
  REFUSE(blocks, 65537, BDIA_STATUS_SETTING);
  REFUSE(per_sample, 0, BDIA_STATUS_SETTING);
  REFUSE(per_sample, SIZE_MAX / 2, BDIA_STATUS_SIZE);
  REFUSE(frame, SIZE_MAX, BDIA_STATUS_SIZE);
  REFUSE(scratch, SIZE_MAX / 5, BDIA_STATUS_SIZE);
  REFUSE(frac_bits, 25, BDIA_STATUS_SETTING);
  REFUSE(gamma, 0.4, BDIA_STATUS_SETTING);
  REFUSE(gamma, NAN, BDIA_STATUS_SETTING);
  REFUSE(sign, 3, BDIA_STATUS_SETTING);
  REFUSE(gamma_change_count, 8, BDIA_STATUS_SETTING);
  c.gamma_change_count = 2;
  c.gamma_changes[0].step = 5;
  c.gamma_changes[0].gamma = c.gamma_changes[1].gamma = 0.25;
  REFUSE(gamma_changes[1].step, 5, BDIA_STATUS_SETTING);
  REFUSE(gamma_changes[1].gamma, 0.3, BDIA_STATUS_SETTING);
  c = config();
  REFUSE(batch, (size_t)1 << 50, BDIA_STATUS_MEMORY);
  REFUSE(threads, 1025, BDIA_STATUS_SETTING);
  REFUSE(threads, (size_t)1 << 40, BDIA_STATUS_SETTING);
  expect(bdia_stack_forward(NULL, 0, 0, 0, x, y), BDIA_STATUS_POINTER, "NULL stack");
  expect(bdia_stack_forward(stack, 0, 0, 0, NULL, y), BDIA_STATUS_POINTER, "NULL x0");
  expect(bdia_stack_forward(stack, 0, 0, 0, x, NULL), BDIA_STATUS_POINTER, "NULL xk");
  expect(bdia_stack_forward(stack, 0, 0, 0, (const float *)((const char *)x + 1), y), BDIA_STATUS_POINTER, "x0 at an odd address");
  expect(bdia_stack_backward(stack, NULL, NULL), BDIA_STATUS_POINTER, "NULL gk");
  expect(bdia_stack_activation(stack, 0, ints, ALL - 1), BDIA_STATUS_SIZE, "too few integers");
  expect(bdia_stack_side_words(stack, NULL), BDIA_STATUS_POINTER, "NULL words");
  expect(bdia_stack_fault(stack, NULL), BDIA_STATUS_POINTER, "NULL fault");
  expect(bdia_stack_memory(stack, NULL), BDIA_STATUS_POINTER, "NULL memory");
  expect(bdia_stack_mismatches(NULL, NULL), BDIA_STATUS_POINTER, "NULL both");
  expect(bdia_stack_free(NULL), BDIA_STATUS_OK, "free NULL");

  expect(bdia_quantize(14, x, NULL, 3), BDIA_STATUS_POINTER, "quantize to NULL");
  expect(bdia_quantize(14, x, (int32_t *)(void *)x, 3), BDIA_STATUS_POINTER, "quantize over the input");
  expect(bdia_quantize(25, x, ints, 3), BDIA_STATUS_SETTING, "a grid that is too fine");
  expect(bdia_quantize(14, NULL, NULL, 0), BDIA_STATUS_OK, "nothing");
  float wild[3] = {1.0f, INFINITY, 70000.0f};
  expect(bdia_quantize(14, wild, ints, 3), BDIA_STATUS_RANGE, "infinity");
  check(ints[0] == 16384 && ints[1] == 0 && ints[2] == 0, "counts as 0");
  expect(bdia_step(14, 0.5, SIZE_MAX, 2, sigma, ints, y, x, side), BDIA_STATUS_SIZE, "absurd sizes");
  expect(bdia_step(14, 0.3, BATCH, P, sigma, ints, y, x, side), BDIA_STATUS_SETTING, "gamma of no power of two");
  expect(bdia_step(14, -0.5, BATCH, P, sigma, ints, y, x, side), BDIA_STATUS_SETTING, "gamma with a sign");
  expect(bdia_step(14, 0.5, BATCH, P, sigma, ints, y, x, NULL), BDIA_STATUS_POINTER, "NULL side bits");
  sigma[2] = 0;
  expect(bdia_step(14, 0.5, BATCH, P, sigma, ints, y, x, side), BDIA_STATUS_SETTING, "a sign of 0");
  expect(bdia_side_words(0.5, SIZE_MAX, SIZE_MAX, &words), BDIA_STATUS_SIZE, "absurd sizes");
}

static void memory(const bdia_blocks *blocks) {
  bdia_config c = config();
  bdia_memory small, deep, real;
  bdia_stack *stack;
  c.verify = 0;
  expect(bdia_plan(&c, &small), BDIA_STATUS_OK, "a plan");
  c.blocks = 40 * K;
  expect(bdia_plan(&c, &deep), BDIA_STATUS_OK, "a plan for forty times the depth");
  check(deep.total - small.total == deep.side_bits - small.side_bits, "depth costs side bits and checksums only");
  /* 64-byte lines: 39 K more planes of one word a sample and row of 20 values, 39 K more sums of two words. */
  check(deep.side_bits - small.side_bits == 39u * K * (BATCH * 4 + 8), "a word a sample and block, two a block");
  check(small.total == small.activations + small.activation_gradients + small.side_bits + small.workspace, "the sum");
  expect(bdia_stack_new(&c, blocks, &stack), BDIA_STATUS_OK, "a deep stack");
  expect(bdia_stack_memory(stack, &real), BDIA_STATUS_OK, "its memory");
  check(!memcmp(&real, &deep, sizeof real), "is what the plan said");
  expect(bdia_stack_free(stack), BDIA_STATUS_OK, "free");
}

int main(void) {
  static Net net;
  static float x[ALL], target[ALL];
  bdia_blocks blocks = {&net, residual, vjp, done};
  bdia_config c = config();
  bdia_stack *stack;
  check(strlen(bdia_last_message()) == 0, "no message before the first failure");
  data(x, target);
  expect(bdia_stack_new(&c, &blocks, &stack), BDIA_STATUS_OK, "a stack");
  training(&net, stack, x, target);
  gradients(&net, &blocks, x, target);
  raw(&net, stack, x);
  faults(&net, &blocks, stack, x, target);
  refusals(&blocks, stack, x);
  memory(&blocks);
  expect(bdia_stack_free(stack), BDIA_STATUS_OK, "free");
  return failed;
}
