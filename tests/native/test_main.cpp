#include <cfloat>  // doctest 2.4.9 needs it, and on macOS nothing else brings it

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
