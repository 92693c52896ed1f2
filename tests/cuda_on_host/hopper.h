// What emulator.cpp and hopper.cpp tell each other.
#pragma once

#include <functional>

namespace cuda_on_host {

// Lets the others run until it holds. A block of which nobody can go on stops the test.
void wait_until(const std::function<bool()>& condition);

// Lets the others run as far as they can.
void wait_until_idle();

void hopper_begins();
void hopper_ends();

}  // namespace cuda_on_host
