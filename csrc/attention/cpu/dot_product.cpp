// The forward of dot-product attention: a tile of queries meets block after block of packed keys.
#include "attention/cpu/dot_product_softmax.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

template <class S, class P>
class Forward : RunningSoftmax<S, P> {
  using Softmax = RunningSoftmax<S, P>;
  using Softmax::biased_, Softmax::scores_, Softmax::weights_, Softmax::sums_;

 public:
  explicit Forward(const AttentionForwardCpu& args) : Softmax(args), args_(args) {
    this->reserve(space_);
    const auto query = space_.reserve(kTileQueries * round_up(args.head_dim, kDeepStep) * sizeof(P));
    const auto copy = space_.reserve(kBlockKeys * round_up(args.value_dim, kColumnStep) * sizeof(P));
    this->place(space_);
    query_buffer_ = static_cast<P*>(space_.at(query));
    copy_ = static_cast<P*>(space_.at(copy));
  }

  void run(int64_t item) {
    const TileItem where(args_, args_.plan.tiles, item);
    const AttentionSequence s(args_, where.sequence);
    const Band band(args_, s);
    const int64_t most = tile_rows(s.queries), i = where.tile * most, rows = std::min(most, s.queries - i);
    const int64_t kv_head = where.head / (args_.heads / args_.kv_heads);
    first_panel_ = args_.plan.first_panel(where.sequence, args_.kv_heads, kv_head);
    values_ = HeadRows<P>(args_.packed_value, s, kv_head, first_panel_);
    query_ =
        operand_rows<S, P>(args_.query, args_.head_dim, s.batch, where.head, s.query_start + i, rows, query_buffer_);
    this->start(rows);
    const int64_t begin = band.first_key(i) / kPanelKeys * kPanelKeys, end = band.end_key(i + rows - 1);
    for (int64_t j = begin; j < end; j += kBlockKeys) {
      block(s, band, where.head, i, rows, j, std::min(kBlockKeys, round_up(end - j, kKeyStep<P>)));
    }
    this->finish_all(s, where.head, i, rows);
  }

 private:
  // Keys j … j + width − 1, in steps of kKeyStep.
  void block(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t rows, int64_t j,
             int64_t width) {
    PanelRows seen(band, i, rows, j, width);
    if (biased_ && !this->load_biases(s, band, head, i, rows, j, width, seen)) return;
    multiply_panels<P>(seen, query_, args_.packed_key, first_panel_, j, width, scores_, /*add=*/false);
    for (int64_t r = 0; r < rows; ++r) this->weigh(s, band, head, i + r, r, j, width);
    this->start_sums(rows);
    add_panels<P>(seen, rows, weights_, values_, j, width, sums_, copy_);
  }

  const AttentionForwardCpu& args_;
  Workspace space_;
  Matrix<const P> query_;
  HeadRows<P> values_;
  P *query_buffer_, *copy_;
  int64_t first_panel_ = 0;
};

}  // namespace

void attention_forward_kernel(const AttentionForwardCpu& args, int64_t begin, int64_t end) {
  with_operands(args.dtype, args.plan.widens, [&](auto* type, auto* operand) {
    Forward<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(operand)>> forward(args);
    for (int64_t item = begin; item < end; ++item) forward.run(item);
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
