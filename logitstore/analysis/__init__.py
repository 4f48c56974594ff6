"""Looking at stores and turning them into others: conversion, estimates, audits."""
