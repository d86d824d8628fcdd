// Kernels that test the emulator itself: correct ones, and the same with one bug planted in each.
#pragma once

#include <cstdint>
#include <string>

// Runs the kernel of that name with one block of 64 threads on 64 floats; throws what the emulator throws.
void run_planted(const std::string& name, const float* input, float* output);
