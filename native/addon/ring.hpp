// Space for host data on its way to the device: a ring of bytes, each part free again once its copy is done.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>

namespace fewbit {

/**
 * Hands out parts of [0, size) in turn. A part stays taken until its ticket is done; `wait` is called with the oldest ticket
 * in the way, and must return once that one is done (they are done in order). Pure host logic.
 */
template <class Ticket>
class Ring {
 public:
  explicit Ring(size_t size) : size_(size) {}

  size_t size() const { return size_; }
  size_t pending() const { return taken_.size(); }

  /** Where `bytes` bytes (at most `size`) may be written; `commit` must follow. */
  template <class Wait>
  size_t reserve(size_t bytes, Wait wait) {
    size_t begin = head_;
    if (begin + bytes > size_) begin = 0;
    // Everything before the first part in the way is older, so parts are let go oldest first until none overlaps.
    while (overlaps(begin, begin + bytes)) {
      wait(taken_.front().ticket);
      taken_.pop_front();
    }
    begin_ = begin;
    end_ = begin + bytes;
    return begin;
  }

  /** The reserved part is taken until `ticket` is done. */
  void commit(Ticket ticket) {
    taken_.push_back({begin_, end_, ticket});
    head_ = end_;
  }

  /** Lets go, oldest first, of what `done` says is done. */
  template <class Done>
  void collect(Done done) {
    while (!taken_.empty() && done(taken_.front().ticket)) taken_.pop_front();
  }

 private:
  struct Part {
    size_t begin, end;
    Ticket ticket;
  };
  bool overlaps(size_t begin, size_t end) const {
    for (const Part& part : taken_)
      if (part.begin < end && begin < part.end) return true;
    return false;
  }

  size_t size_, head_ = 0, begin_ = 0, end_ = 0;
  std::deque<Part> taken_;
};

}  // namespace fewbit
