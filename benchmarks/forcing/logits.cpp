// Token ids in, logits out, with llama.cpp: logits MODEL THREADS CACHE LENGTH
//
// CACHE is f16, bf16 or q8_0 (f32 would be f16: flash attention rounds it). It writes the size of the vocabulary (int32),
// and then, for each text on stdin (int32 count, at most LENGTH; int32 ids), one row of float32 a token. Everything else
// is as llama-server has it by default.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "llama.h"

namespace {

void say_errors(ggml_log_level level, const char* text, void*) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

llama_context* make_context(llama_model* model, int threads, ggml_type cache, uint32_t length) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = length;
    params.n_threads = params.n_threads_batch = threads;
    params.type_k = params.type_v = cache;
    return llama_init_from_model(model, params);
}

}  // namespace

int main(int count, char** words) {
    require(count == 5, "usage: logits MODEL THREADS CACHE LENGTH");
    const std::map<std::string, ggml_type> types = {
        {"f16", GGML_TYPE_F16}, {"bf16", GGML_TYPE_BF16}, {"q8_0", GGML_TYPE_Q8_0}};
    const auto cache = types.find(words[3]);
    require(cache != types.end(), "CACHE is none of f16, bf16, q8_0");
    const int32_t length = std::max(1, std::atoi(words[4]));

    llama_log_set(say_errors, nullptr);
    llama_backend_init();
    llama_model* model = llama_model_load_from_file(words[1], llama_model_default_params());
    require(model != nullptr, "the model does not load");
    llama_context* context = make_context(model, std::atoi(words[2]), cache->second, length);
    require(context != nullptr, "there is no context of this kind");

    const int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::fwrite(&vocabulary, sizeof vocabulary, 1, stdout);
    std::fflush(stdout);
    llama_batch batch = llama_batch_init(length, 0, 1);
    std::vector<int32_t> ids;
    for (int32_t tokens; std::fread(&tokens, sizeof tokens, 1, stdin) == 1;) {
        require(tokens > 0 && tokens <= length, "a text is empty or longer than LENGTH");
        ids.resize(tokens);
        require(std::fread(ids.data(), sizeof(int32_t), tokens, stdin) == size_t(tokens), "a text breaks off");
        llama_memory_clear(llama_get_memory(context), true);
        batch.n_tokens = tokens;
        for (int32_t at = 0; at < tokens; ++at) {
            batch.token[at] = ids[at];
            batch.pos[at] = at;
            batch.n_seq_id[at] = 1;
            batch.seq_id[at][0] = 0;
            batch.logits[at] = 1;
        }
        require(llama_decode(context, batch) == 0, "llama_decode failed");
        for (int32_t at = 0; at < tokens; ++at)
            std::fwrite(llama_get_logits_ith(context, at), sizeof(float), vocabulary, stdout);
        std::fflush(stdout);
    }
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
}
