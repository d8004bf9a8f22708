#pragma once

/* What a backend that is loaded at run time exports: plain C, so that it may be built by another compiler
 * with another C++ library. A plug-in exports one function, `qwen2vl_backend`. The host
 * (engine/plugin_backend.cpp) turns its table into a Backend; config.h and weights.h say what the fields
 * mean.
 *
 * Every call returns a qwen2vl_status; where it is not OK, `error` holds a message for the user. Pointers
 * that the host passes live as long as the call, those in qwen2vl_model as long as the backend. Calls on one
 * backend and its pages come one at a time, from any thread. */

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QWEN2VL_BACKEND_ABI 2u
#define QWEN2VL_BACKEND_SYMBOL "qwen2vl_backend"

typedef enum qwen2vl_status {
  QWEN2VL_OK = 0,
  QWEN2VL_CANCELLED = 1,   /* the progress callback asked for it; cells before its rows are as they were */
  QWEN2VL_INVALID = 2,     /* std::invalid_argument */
  QWEN2VL_UNSUPPORTED = 3, /* UnsupportedError */
  QWEN2VL_DEVICE = 4,      /* DeviceError: no driver, no device, too little memory, a fault of it */
  QWEN2VL_FAILED = 5       /* Error */
} qwen2vl_status;

typedef struct qwen2vl_error {
  char message[2048];
} qwen2vl_error;

/* Returns nonzero to cancel. */
typedef struct qwen2vl_progress {
  int (*report)(void* context, int64_t done, int64_t total);
  void* context;
} qwen2vl_progress;

/* --- the model ---------------------------------------------------------------------------------------- */

typedef struct qwen2vl_matrix { /* MatrixView; data is NULL for an absent matrix */
  uint32_t type;                /* as GGUF numbers types */
  int64_t rows, cols;
  const uint8_t* data;
} qwen2vl_matrix;

typedef struct qwen2vl_vector { /* size 0: absent */
  const float* data;
  int64_t size;
} qwen2vl_vector;

typedef struct qwen2vl_linear {
  qwen2vl_matrix weight;
  qwen2vl_vector bias;
} qwen2vl_linear;

typedef struct qwen2vl_norm {
  qwen2vl_vector weight, bias;
} qwen2vl_norm;

typedef struct qwen2vl_decoder_layer {
  qwen2vl_norm input_layernorm;
  qwen2vl_linear q_proj, k_proj, v_proj, o_proj;
  qwen2vl_norm post_attention_layernorm;
  qwen2vl_linear gate_proj, up_proj, down_proj;
} qwen2vl_decoder_layer;

typedef struct qwen2vl_text {
  int64_t hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
      head_dim, vocab_size, max_position_embeddings;
  float rms_norm_eps, rope_theta;
  int64_t mrope_section[3];
  qwen2vl_matrix embed_tokens;
  const qwen2vl_decoder_layer* layers; /* num_hidden_layers of them */
  qwen2vl_norm norm;
  qwen2vl_matrix lm_head; /* absent where tied */
} qwen2vl_text;

typedef struct qwen2vl_vision_block {
  qwen2vl_norm norm1;
  qwen2vl_linear q, k, v, proj;
  qwen2vl_norm norm2;
  qwen2vl_linear fc1, fc2;
} qwen2vl_vision_block;

typedef struct qwen2vl_vision {
  int64_t embed_dim, depth, num_heads, head_dim, intermediate_size, hidden_size, patch_size,
      temporal_patch_size, spatial_merge_size, in_channels;
  float layer_norm_eps;
  qwen2vl_matrix patch_embed[2];
  const qwen2vl_vision_block* blocks; /* depth of them */
  qwen2vl_norm ln_q;
  qwen2vl_linear mlp_0, mlp_2;
} qwen2vl_vision;

typedef struct qwen2vl_model {
  qwen2vl_text text;
  const qwen2vl_vision* vision; /* NULL in a file with the language model alone */
} qwen2vl_model;

/* --- the backend -------------------------------------------------------------------------------------- */

typedef struct qwen2vl_options {
  int32_t device;       /* index among `devices` */
  int32_t more_devices; /* those behind it may be used, too, where it does not hold the model */
  int32_t exact;        /* Precision::Exact */
  int64_t memory_bytes; /* of a device that may be used; 0: what is free. Layers beyond stay in the host's. */
} qwen2vl_options;

typedef struct qwen2vl_device {
  char name[256];
  int64_t total_bytes, free_bytes;
  int32_t compute_capability; /* 90 for 9.0 */
  int32_t multiprocessors;
} qwen2vl_device;

typedef struct qwen2vl_info {
  char device[256];     /* "NVIDIA H200, sm_90a" */
  char note[512];       /* a word to the user, or empty: "11 of 28 layers stay in the host's memory ..." */
  int64_t weight_bytes; /* of the weights used so far: the vision tower's count from the first image */
  int64_t max_batch_rows;
  int64_t page_cells, page_bytes; /* of a page of the KV cache */
} qwen2vl_info;

typedef struct qwen2vl_limits { /* what the device can do at most in a second */
  double float_ops;             /* of bf16 matrix products (a multiply and an add are two) */
  double fp32_ops;
  double read_bytes;
} qwen2vl_limits;

typedef struct qwen2vl_stage { /* StageRecord */
  char name[64];
  int64_t calls;
  double seconds, int8_ops, float_ops, bytes;
} qwen2vl_stage;

typedef struct qwen2vl_backend_handle qwen2vl_backend_handle;
typedef struct qwen2vl_page_handle qwen2vl_page_handle;

typedef struct qwen2vl_rows { /* SequenceRows */
  qwen2vl_page_handle* const*
      pages; /* of all its cells, those of the rows included; full ones may be shared */
  int64_t n_pages;
  int64_t first_cell; /* of the rows: so many have been computed */
  int64_t n;
  const int32_t* token_ids;       /* [n] */
  const float* const* embeddings; /* [n], NULL entries for tokens */
  const int32_t* positions;       /* [n][3] */
  int32_t logits;                 /* 0 none, 1 of the last row, 2 of all */
} qwen2vl_rows;

typedef struct qwen2vl_backend_api {
  uint32_t abi;  /* QWEN2VL_BACKEND_ABI */
  uint32_t size; /* sizeof(qwen2vl_backend_api) */
  const char* name;

  /* Writes up to `capacity` devices and their number; QWEN2VL_DEVICE, saying why, where there is none. */
  int (*devices)(qwen2vl_device* out, int32_t capacity, int32_t* count, qwen2vl_error* error);
  int (*measure_limits)(int32_t device, double seconds, qwen2vl_limits* out, qwen2vl_error* error);

  int (*create)(const qwen2vl_model* model, const qwen2vl_options* options, qwen2vl_progress progress,
                qwen2vl_backend_handle** out, qwen2vl_error* error);
  void (*destroy)(qwen2vl_backend_handle* backend); /* after its pages */
  void (*info)(const qwen2vl_backend_handle* backend, qwen2vl_info* out);

  int (*new_page)(qwen2vl_backend_handle* backend, qwen2vl_page_handle** out, qwen2vl_error* error);
  void (*free_page)(qwen2vl_backend_handle* backend, qwen2vl_page_handle* page);
  int (*copy_page)(qwen2vl_backend_handle* backend, const qwen2vl_page_handle* from, qwen2vl_page_handle* to,
                   qwen2vl_error* error);

  int (*encode_vision)(qwen2vl_backend_handle* backend, const float* pixel_values, int64_t t, int64_t h,
                       int64_t w, float* out, qwen2vl_progress progress, qwen2vl_error* error);
  /* A still, of h x w patches: its pixels [h patch_size][w patch_size][in_channels], and what a byte of each
   * channel becomes [in_channels][256]. */
  int (*encode_pixels)(qwen2vl_backend_handle* backend, const uint8_t* pixels, const float* levels, int64_t h,
                       int64_t w, float* out, qwen2vl_progress progress, qwen2vl_error* error);
  /* Backend::forward. With logits NULL the logits wanted stay on the device until the next call: `likeliest`
   * and `kept_logits` ask for a row of them. */
  int (*forward)(qwen2vl_backend_handle* backend, const qwen2vl_rows* batch, int64_t n, float* logits,
                 qwen2vl_progress progress, qwen2vl_error* error);
  /* The first of a row's largest logits; -1 where none is a number. Whoever asks this way is likely to append
   * that very token next: the device may begin with it. */
  int (*likeliest)(qwen2vl_backend_handle* backend, int64_t row, int32_t* token, qwen2vl_error* error);
  int (*kept_logits)(qwen2vl_backend_handle* backend, int64_t row, float* out, /* [vocab_size] */
                     qwen2vl_error* error);

  int (*start_profile)(qwen2vl_backend_handle* backend, qwen2vl_error* error);
  int (*stop_profile)(qwen2vl_backend_handle* backend, qwen2vl_stage* out, int32_t capacity, int32_t* count,
                      qwen2vl_error* error);
  int (*read_weights)(qwen2vl_backend_handle* backend, int64_t* bytes, qwen2vl_error* error);
} qwen2vl_backend_api;

typedef const qwen2vl_backend_api* (*qwen2vl_backend_function)(void);

#ifdef __cplusplus
}
#endif
