// Kernels that test the emulator itself: correct ones, and the same with one bug planted in each.
#pragma once

#include <cstdint>
#include <string>

// Runs the kernel of that name with one block of 64 threads on 64 floats; throws what the emulator throws.
void run_planted(const std::string& name, const float* input, float* output);

// The product kernel of that name: to c [32, 8] it adds a[i] b[i] for a [2, 32, 64] and b [2, 8, 64], by columns, or
// [2, 64, 8], by rows.
void run_planted_product(const std::string& name, const void* a, const void* b, float* c);
