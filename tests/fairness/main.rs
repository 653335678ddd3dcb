//! A slow caller never stalls the others, and no caller starves.

mod tenants;
mod unpolled;
