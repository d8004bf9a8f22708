/* A plug-in without a device, for tests of the host's side (tests/test_devices.py). Its model says t + 1
 * after token t. FAKE_DEVICES is how many devices it has (1); FAKE_FAIL makes calls fail: "create=4
 * forward=2" with numbers of qwen2vl_status; FAKE_NOTE is its note. What it counts is exported.
 *
 * Compiled with -DFAKE_ABI=n or -DFAKE_SYMBOL=name it is no plug-in for this host. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/backend_abi.h"

#ifndef FAKE_ABI
#define FAKE_ABI QWEN2VL_BACKEND_ABI
#endif
#ifndef FAKE_SYMBOL
#define FAKE_SYMBOL qwen2vl_backend
#endif

enum { ROWS = 8, DAMAGED_TOKEN = 1000 };

int32_t fake_live_backends, fake_live_caches, fake_caches_left_behind, fake_overlapping_calls;
int32_t fake_likeliest_calls, fake_last_logits_calls, fake_forward_calls, fake_forward_without_logits;
int32_t fake_exact, fake_device;
int64_t fake_memory_bytes;

static int32_t busy;

struct qwen2vl_backend_handle {
  const qwen2vl_model* model;
  int32_t has_seen, profiling, caches;
  int64_t calls;
};

struct qwen2vl_cache_handle {
  qwen2vl_backend_handle* backend;
  int64_t size;
  int32_t last; /* token */
};

static void enter(void) { fake_overlapping_calls += busy++ != 0; }
static void leave(void) { --busy; }

static int done(const char* call, qwen2vl_error* error) {
  const char* fail = getenv("FAKE_FAIL");
  const char* found = fail ? strstr(fail, call) : NULL;
  if (found == NULL || found[strlen(call)] != '=') return QWEN2VL_OK;
  snprintf(error->message, sizeof error->message, "%s: the fake fails", call);
  return atoi(found + strlen(call) + 1);
}

static int cancelled(qwen2vl_progress progress, int64_t steps) {
  for (int64_t i = 1; i <= steps; ++i)
    if (progress.report(progress.context, i, steps)) return 1;
  return 0;
}

static int devices(qwen2vl_device* out, int32_t capacity, int32_t* count, qwen2vl_error* error) {
  const char* number = getenv("FAKE_DEVICES");
  *count = number ? atoi(number) : 1;
  if (*count == 0) {
    snprintf(error->message, sizeof error->message, "no driver was found");
    return QWEN2VL_DEVICE;
  }
  for (int32_t i = 0; i < *count && i < capacity; ++i) {
    memset(&out[i], 0, sizeof out[i]);
    snprintf(out[i].name, sizeof out[i].name, "Fake %d", i);
    out[i].total_bytes = 8000000000;
    out[i].free_bytes = 6000000000;
    out[i].compute_capability = 123;
    out[i].multiprocessors = 3;
  }
  return done("devices", error);
}

static int measure_limits(int32_t device, double seconds, qwen2vl_limits* out, qwen2vl_error* error) {
  out->float_ops = 4e12 + device + 0 * seconds;
  out->fp32_ops = 1e12;
  out->read_bytes = 2e11;
  return done("measure_limits", error);
}

static int create(const qwen2vl_model* model, const qwen2vl_options* options, qwen2vl_progress progress,
                  qwen2vl_backend_handle** out, qwen2vl_error* error) {
  const int status = done("create", error);
  if (status) return status;
  if (cancelled(progress, model->text.num_hidden_layers)) return QWEN2VL_CANCELLED;
  *out = calloc(1, sizeof **out);
  (*out)->model = model;
  ++fake_live_backends;
  fake_exact = options->exact;
  fake_device = options->device;
  fake_memory_bytes = options->memory_bytes;
  return QWEN2VL_OK;
}

static void destroy(qwen2vl_backend_handle* backend) {
  fake_caches_left_behind += backend->caches;
  --fake_live_backends;
  free(backend);
}

static void info(const qwen2vl_backend_handle* backend, qwen2vl_info* out) {
  const char* note = getenv("FAKE_NOTE");
  memset(out, 0, sizeof *out);
  snprintf(out->device, sizeof out->device, "Fake, made of C");
  snprintf(out->note, sizeof out->note, "%s", note ? note : "");
  out->weight_bytes = backend->has_seen ? 2000 : 1000;
  out->max_batch_rows = ROWS;
}

static int new_cache(qwen2vl_backend_handle* backend, qwen2vl_cache_handle** out, qwen2vl_error* error) {
  enter();
  const int status = done("new_cache", error);
  if (!status) {
    *out = calloc(1, sizeof **out);
    (*out)->backend = backend;
    ++backend->caches;
    ++fake_live_caches;
  }
  leave();
  return status;
}

static void free_cache(qwen2vl_cache_handle* cache) {
  enter();
  --cache->backend->caches;
  --fake_live_caches;
  free(cache);
  leave();
}

static int64_t cache_size(const qwen2vl_cache_handle* cache) { return cache->size; }

static void cache_truncate(qwen2vl_cache_handle* cache, int64_t size) {
  enter();
  cache->size = size;
  leave();
}

static int64_t cache_bytes(const qwen2vl_cache_handle* cache) { return 100 * cache->size; }

static int encode_vision(qwen2vl_backend_handle* backend, const float* pixel_values, int64_t t, int64_t h,
                         int64_t w, float* out, qwen2vl_progress progress, qwen2vl_error* error) {
  enter();
  int status = done("encode_vision", error);
  const qwen2vl_vision* vision = backend->model->vision;
  if (!status && cancelled(progress, vision->depth)) status = QWEN2VL_CANCELLED;
  if (!status) {
    const int64_t cells = t * h * w / (vision->spatial_merge_size * vision->spatial_merge_size);
    for (int64_t i = 0; i < cells * vision->hidden_size; ++i) out[i] = pixel_values[0];
    backend->has_seen = 1;
  }
  leave();
  return status;
}

static int encode_pixels(qwen2vl_backend_handle* backend, const uint8_t* pixels, const float* levels,
                         int64_t h, int64_t w, float* out, qwen2vl_progress progress, qwen2vl_error* error) {
  return encode_vision(backend, &levels[pixels[0]], 1, h, w, out, progress, error);
}

static int32_t next_token(const qwen2vl_cache_handle* cache) {
  return (cache->last + 1) % (int32_t)cache->backend->model->text.vocab_size;
}

static void write_logits(const qwen2vl_cache_handle* cache, float* out) {
  for (int64_t i = 0; i < cache->backend->model->text.vocab_size; ++i) out[i] = 0;
  out[next_token(cache)] = 1;
}

static int forward(qwen2vl_backend_handle* backend, const qwen2vl_rows* batch, int64_t n, float* logits,
                   qwen2vl_progress progress, qwen2vl_error* error) {
  enter();
  ++fake_forward_calls;
  fake_forward_without_logits += logits == NULL;
  int status = done("forward", error);
  if (!status && cancelled(progress, backend->model->text.num_hidden_layers)) status = QWEN2VL_CANCELLED;
  for (int64_t s = 0; s < n && !status; ++s) {
    qwen2vl_cache_handle* cache = batch[s].cache;
    if (batch[s].n > ROWS || (batch[s].logits == 2 && logits == NULL)) status = QWEN2VL_FAILED;
    for (int64_t i = 0; i < batch[s].n && !status; ++i) {
      cache->last = batch[s].token_ids[i];
      ++cache->size;
      if (logits == NULL || !(batch[s].logits == 2 || (batch[s].logits == 1 && i + 1 == batch[s].n)))
        continue;
      write_logits(cache, logits);
      logits += backend->model->text.vocab_size;
    }
  }
  backend->calls += backend->profiling;
  leave();
  return status;
}

static int likeliest(qwen2vl_cache_handle* cache, int32_t* token, qwen2vl_error* error) {
  enter();
  ++fake_likeliest_calls;
  *token = cache->last == DAMAGED_TOKEN ? -1 : next_token(cache);
  leave();
  return done("likeliest", error);
}

static int last_logits(qwen2vl_cache_handle* cache, float* out, qwen2vl_error* error) {
  enter();
  ++fake_last_logits_calls;
  write_logits(cache, out);
  leave();
  return done("last_logits", error);
}

static int start_profile(qwen2vl_backend_handle* backend, qwen2vl_error* error) {
  backend->profiling = 1;
  backend->calls = 0;
  return done("start_profile", error);
}

static int stop_profile(qwen2vl_backend_handle* backend, qwen2vl_stage* out, int32_t capacity, int32_t* count,
                        qwen2vl_error* error) {
  *count = capacity > 0 && backend->calls > 0;
  if (*count) {
    const qwen2vl_stage stage = {"text all", backend->calls, 1e-3, 1e6, 2e6, 3e6};
    out[0] = stage;
  }
  backend->profiling = 0;
  return done("stop_profile", error);
}

/* The sum of all bytes of the weights: a test of what the host has passed. */
static int64_t sum_matrix(const qwen2vl_matrix* m) {
  int64_t sum = 0;
  if (m->data == NULL) return 0;
  if (m->type != 0) return 0; /* not float32: not a model of that test */
  for (int64_t i = 0; i < 4 * m->rows * m->cols; ++i) sum += m->data[i];
  return sum;
}

static int64_t sum_vector(const qwen2vl_vector* v) {
  const qwen2vl_matrix as_matrix = {0, 1, v->size, v->size ? (const uint8_t*)v->data : NULL};
  return sum_matrix(&as_matrix);
}

static int64_t sum_linear(const qwen2vl_linear* l) { return sum_matrix(&l->weight) + sum_vector(&l->bias); }

static int64_t sum_norm(const qwen2vl_norm* n) { return sum_vector(&n->weight) + sum_vector(&n->bias); }

static int read_weights(qwen2vl_backend_handle* backend, int64_t* bytes, qwen2vl_error* error) {
  const qwen2vl_text* text = &backend->model->text;
  const qwen2vl_vision* vision = backend->model->vision;
  int64_t sum = sum_matrix(&text->embed_tokens) + sum_norm(&text->norm) + sum_matrix(&text->lm_head);
  for (int64_t i = 0; i < text->num_hidden_layers; ++i) {
    const qwen2vl_decoder_layer* l = &text->layers[i];
    sum += sum_norm(&l->input_layernorm) + sum_linear(&l->q_proj) + sum_linear(&l->k_proj) +
           sum_linear(&l->v_proj) + sum_linear(&l->o_proj) + sum_norm(&l->post_attention_layernorm) +
           sum_linear(&l->gate_proj) + sum_linear(&l->up_proj) + sum_linear(&l->down_proj);
  }
  if (vision != NULL) {
    sum += sum_matrix(&vision->patch_embed[0]) + sum_matrix(&vision->patch_embed[1]) +
           sum_norm(&vision->ln_q) + sum_linear(&vision->mlp_0) + sum_linear(&vision->mlp_2);
    for (int64_t i = 0; i < vision->depth; ++i) {
      const qwen2vl_vision_block* b = &vision->blocks[i];
      sum += sum_norm(&b->norm1) + sum_linear(&b->q) + sum_linear(&b->k) + sum_linear(&b->v) +
             sum_linear(&b->proj) + sum_norm(&b->norm2) + sum_linear(&b->fc1) + sum_linear(&b->fc2);
    }
  }
  *bytes = sum;
  return done("read_weights", error);
}

const qwen2vl_backend_api* FAKE_SYMBOL(void) {
  static const qwen2vl_backend_api api = {
      .abi = FAKE_ABI,
      .size = sizeof(qwen2vl_backend_api),
      .name = "cuda",
      .devices = devices,
      .measure_limits = measure_limits,
      .create = create,
      .destroy = destroy,
      .info = info,
      .new_cache = new_cache,
      .free_cache = free_cache,
      .cache_size = cache_size,
      .cache_truncate = cache_truncate,
      .cache_bytes = cache_bytes,
      .encode_vision = encode_vision,
      .encode_pixels = encode_pixels,
      .forward = forward,
      .likeliest = likeliest,
      .last_logits = last_logits,
      .start_profile = start_profile,
      .stop_profile = stop_profile,
      .read_weights = read_weights,
  };
  return &api;
}
