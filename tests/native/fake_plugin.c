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

enum { ROWS = 8, PAGE_CELLS = 4, PAGE_BYTES = 400, DAMAGED_TOKEN = 1000 };

int32_t fake_live_backends, fake_live_pages, fake_pages_left_behind, fake_overlapping_calls, fake_page_copies;
int32_t fake_likeliest_calls, fake_kept_logits_calls, fake_forward_calls, fake_forward_without_logits;
int32_t fake_exact, fake_device, fake_more_devices;
int64_t fake_memory_bytes;

static int32_t busy;

struct qwen2vl_backend_handle {
  const qwen2vl_model* model;
  int32_t has_seen, profiling, pages;
  int64_t calls;
  int64_t n_kept;
  int32_t kept[ROWS]; /* tokens whose logits stay */
};

struct qwen2vl_page_handle {
  int32_t tokens[PAGE_CELLS]; /* -1 where nothing was computed */
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
  fake_more_devices = options->more_devices;
  fake_memory_bytes = options->memory_bytes;
  return QWEN2VL_OK;
}

static void destroy(qwen2vl_backend_handle* backend) {
  fake_pages_left_behind += backend->pages;
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
  out->page_cells = PAGE_CELLS;
  out->page_bytes = PAGE_BYTES;
}

static int new_page(qwen2vl_backend_handle* backend, qwen2vl_page_handle** out, qwen2vl_error* error) {
  enter();
  const int status = done("new_page", error);
  if (!status) {
    *out = malloc(sizeof **out);
    memset(*out, 0xff, sizeof **out);
    ++backend->pages;
    ++fake_live_pages;
  }
  leave();
  return status;
}

static void free_page(qwen2vl_backend_handle* backend, qwen2vl_page_handle* page) {
  enter();
  --backend->pages;
  --fake_live_pages;
  free(page);
  leave();
}

static int copy_page(qwen2vl_backend_handle* backend, const qwen2vl_page_handle* from,
                     qwen2vl_page_handle* to, qwen2vl_error* error) {
  (void)backend;
  enter();
  *to = *from;
  ++fake_page_copies;
  leave();
  return done("copy_page", error);
}

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

static int32_t next_token(const qwen2vl_backend_handle* backend, int32_t token) {
  return (token + 1) % (int32_t)backend->model->text.vocab_size;
}

static void write_logits(const qwen2vl_backend_handle* backend, int32_t token, float* out) {
  for (int64_t i = 0; i < backend->model->text.vocab_size; ++i) out[i] = 0;
  out[next_token(backend, token)] = 1;
}

static int forward(qwen2vl_backend_handle* backend, const qwen2vl_rows* batch, int64_t n, float* logits,
                   qwen2vl_progress progress, qwen2vl_error* error) {
  enter();
  ++fake_forward_calls;
  fake_forward_without_logits += logits == NULL;
  int status = done("forward", error);
  if (!status && cancelled(progress, backend->model->text.num_hidden_layers)) status = QWEN2VL_CANCELLED;
  backend->n_kept = 0;
  for (int64_t s = 0; s < n && !status; ++s) {
    const qwen2vl_rows* rows = &batch[s];
    if (rows->n > ROWS || (rows->logits == 2 && logits == NULL)) status = QWEN2VL_FAILED;
    if (rows->n_pages != (rows->first_cell + rows->n + PAGE_CELLS - 1) / PAGE_CELLS) status = QWEN2VL_FAILED;
    for (int64_t i = 0; i < rows->first_cell && !status; ++i)
      if (rows->pages[i / PAGE_CELLS]->tokens[i % PAGE_CELLS] < 0) status = QWEN2VL_FAILED;
    for (int64_t i = 0; i < rows->n && !status; ++i) {
      const int64_t cell = rows->first_cell + i;
      rows->pages[cell / PAGE_CELLS]->tokens[cell % PAGE_CELLS] = rows->token_ids[i];
      if (!(rows->logits == 2 || (rows->logits == 1 && i + 1 == rows->n))) continue;
      if (logits == NULL) {
        backend->kept[backend->n_kept++] = rows->token_ids[i];
        continue;
      }
      write_logits(backend, rows->token_ids[i], logits);
      logits += backend->model->text.vocab_size;
    }
  }
  if (status == QWEN2VL_FAILED) snprintf(error->message, sizeof error->message, "forward: the fake fails");
  backend->calls += backend->profiling;
  leave();
  return status;
}

static int likeliest(qwen2vl_backend_handle* backend, int64_t row, int32_t* token, qwen2vl_error* error) {
  if (row < 0 || row >= backend->n_kept) return QWEN2VL_INVALID;
  enter();
  ++fake_likeliest_calls;
  *token = backend->kept[row] == DAMAGED_TOKEN ? -1 : next_token(backend, backend->kept[row]);
  leave();
  return done("likeliest", error);
}

static int kept_logits(qwen2vl_backend_handle* backend, int64_t row, float* out, qwen2vl_error* error) {
  if (row < 0 || row >= backend->n_kept) return QWEN2VL_INVALID;
  enter();
  ++fake_kept_logits_calls;
  write_logits(backend, backend->kept[row], out);
  leave();
  return done("kept_logits", error);
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
      .new_page = new_page,
      .free_page = free_page,
      .copy_page = copy_page,
      .encode_vision = encode_vision,
      .encode_pixels = encode_pixels,
      .forward = forward,
      .likeliest = likeliest,
      .kept_logits = kept_logits,
      .start_profile = start_profile,
      .stop_profile = stop_profile,
      .read_weights = read_weights,
  };
  return &api;
}
