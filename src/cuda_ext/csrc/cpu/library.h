// What the launchers share.
#pragma once

struct Level;

const Level& current_level();
